"""The keys of `config.audit`: the owner's limits, and what an auditor writes into the report."""

from ml_collections import ConfigDict


def auditing() -> ConfigDict:
    """Limits of what one principal may ask, and texts. Nothing is trained or asked by them."""
    return ConfigDict(
        dict(
            # queries that one principal (an account, a key, an address) may make in a second,
            # evenly spaced; 0 is no limit
            per_second=0.0,
            # in a day, at any time of it; 0 is no limit
            per_day=0,
            # in 30 days, at any time of them; 0 is no limit
            per_month=0,
            principals=1,  # that an attacker may have; they share the work
            # share of the target's accuracy, and of images in agreement, that no copy of a month
            # may reach
            below=0.9,
            authorised_by="",  # who allowed the audit, and under which agreement
            model="",  # the model's name and version, as its owner knows it
            environment="",  # where it ran: production, staging, a copy
            scope="",  # what was to be tested, and what was not
            attacker="",  # whom the limits are to hold off: images, computers, accounts
            residual_risk="",  # what remains, in the auditor's words
            # npz of the model's trigger images and of how it is to answer them: image, label.
            # The report says how often each student answers them so. The model is not asked.
            watermark="",
            # FILE.py:function or module:function of scores, uint8[b, H, W, C] -> f32[b, N], that
            # asks the model nothing, as class names through a text encoder. The report has its
            # accuracy and fidelity.
            zero="",
            zero_watch=(),  # more files that it is made of, as weights
        )
    )
