"""A target behind the Open Inference Protocol v2 (KServe, Triton, TorchServe, MLServer), over HTTP.

The protocol is https://github.com/kserve/open-inference-protocol,
specification/protocol/inference_rest.md. Tensors go as JSON, or in Triton's binary data extension
(triton-inference-server/server, docs/protocol/extension_binary_data.md) if the server lists it.
"""

import hashlib
import json
import uuid
from urllib.parse import quote

import numpy as np

from qmx.ledger import Unavailable
from qmx.ledger.access import received
from qmx.targets.address import secrets
from qmx.targets.http import AGAIN, Send, client
from qmx.targets.protocol import INPUTS, LABELS, OUTPUTS, Tensor, parsed, read, request
from qmx.targets.query import Outside, filled_up
from qmx.targets.said import masked, without
from qmx.targets.shown import UNCHANGED, Shown, prepare, resolved
from qmx.targets.shown import name as name_of


def connect(
    url: str,
    model: str,
    *,
    shape: tuple[int, int, int],
    classes: int,
    version: str = "",
    input: str = "",
    output: str = "",
    access: str = "logits",
    token_env: str = "",
    headers_env: tuple[str, ...] = (),
    ca_file: str = "",
    timeout: float = 60.0,
    rate: float = 0.0,
    shown: Shown = UNCHANGED,
) -> Outside:
    """A query function around a served model: one request for each call, and no second attempt.

    It checks the model's metadata first, so a wrong setting costs no query.

    The digest is of the address, the model's name and version, and its platform, inputs and outputs
    in the metadata. It is part of the ledger's keys: at another address or version everything is
    asked again. New weights under the same version go unnoticed.

    Args:
      url: of the server, as in https://models.example.org:8443; see `qmx.targets.http.client` for
        this and for `token_env`, `headers_env`, `ca_file`, `timeout` and `rate`.
      shape: of the images, H, W, C.
      shown: how the model gets them; its metadata say the type and the order of the axes, where
        they say anything.
      classes: N, 0 if it is not known.
      version: of the model; by default the one that the server lists.
      input, output: names of the tensors; by default the only ones that the server lists.
      access: level of the output, "logits", "probs" or "label"; see `qmx.ledger.access.received`.

    Raises:
      Unavailable: there is no server, or the model is not ready. By the query: see
        `qmx.targets.http.client`.
      ValueError: no such model, version or tensor, images or classes that do not fit, a refused
        address or token. By the query: an answer that does not fit the request.
    """
    send = client(
        url,
        token_env=token_env,
        headers_env=headers_env,
        ca_file=ca_file,
        timeout=timeout,
        rate=rate,
    )
    hidden = secrets(token_env, headers_env)
    base = f"/v2/models/{quote(model, safe='')}"
    named = f"/versions/{quote(version, safe='')}" if version else ""
    with without(*hidden):
        metadata = parsed(*send("GET", base + named, None, {}))
        version = version or _only_version(metadata, model)
        if version:
            base += f"/versions/{quote(version, safe='')}"
        _check_ready(send, f"{base}/ready")
        model_input = _tensor(metadata, "input", input, Tensor(input, "", []))
        model_output = _tensor(metadata, "output", output, Tensor(output, "", []))
        _check_tensors(model_input, model_output, classes, access)
        dtype = INPUTS[model_input.datatype] if model_input.datatype else ""
        seen = resolved(shown, shape, dtype, model_input.shape)
        binary = "binary_tensor_data" in _extensions(send)
    known = OUTPUTS | (LABELS if access == "label" else {})

    fixed = max([0, *model_input.shape[:1]])  # images in a request, where the model takes no other

    def query(images: np.ndarray) -> np.ndarray:
        number, count = uuid.uuid4().hex, len(images)
        if fixed and count > fixed:
            raise ValueError(
                f"the model takes {fixed} images in a request; set target.batch_size={fixed}"
            )
        if fixed:
            images = images[filled_up(count, fixed)[0]]
        pixels = prepare(images, seen)
        body, headers = request(number, model_input, model_output, pixels, binary)
        with without(*secrets(token_env, headers_env)):
            answer, reply_headers = send("POST", f"{base}/infer", body, headers)
            scores = read(answer, reply_headers, number, version, model_output.name, known)
            return received(scores, len(images), classes, access)[:count]

    about = {key: metadata.get(key) for key in ("platform", "inputs", "outputs")}
    identity = {"url": url.rstrip("/"), "model": model, "version": version, **about}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    told = f" version {masked(version, *hidden)}" if version else ""
    return Outside(query, f"{model}{told} at {url.rstrip('/')}", digest, name_of(seen))


def _check_ready(send: Send, path: str) -> None:
    """Raise Unavailable unless the model is ready, by the status and by a body if there is one."""
    try:
        body, headers = send("GET", path, None, {})
        ready = not body or parsed(body, headers).get("ready", True)
    except ValueError as error:
        why = str(error).removesuffix(f"; {AGAIN}")
        raise Unavailable(f"the model is not ready: {why}") from None
    if not ready:
        raise Unavailable("the model is not ready; wait until it is loaded")


def _only_version(metadata: dict, model: str) -> str:
    """The model's one version, "" if it has none. Naming it keeps a later version out."""
    listed = metadata.get("versions") or []
    if not isinstance(listed, list):
        raise ValueError(f"the server's versions of the model {model} are {listed!r}, not a list")
    versions = [str(version) for version in listed]
    if len(versions) > 1:
        raise ValueError(
            f"the model {model} has the versions {', '.join(versions)}; name one in target.version"
        )
    return versions[0] if versions else ""


def _tensor(metadata: dict, kind: str, name: str, default: Tensor) -> Tensor:
    """The input or output called `name`, or the only one; `default` if the server lists none."""
    try:
        listed = [
            Tensor(
                str(each["name"]),
                str(each["datatype"]),
                [int(size) for size in each.get("shape") or []],
            )
            for each in metadata.get(f"{kind}s") or []
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"what the server says of the model's {kind}s is not the protocol's: {error!r}"
        ) from None
    if not listed and not name:
        raise ValueError(
            f"the server does not say what the model's {kind} is called; name it in target.{kind}"
        )
    names = ", ".join(each.name for each in listed)
    matches = [each for each in listed if each.name == name] if name else listed
    if len(matches) > 1 or (listed and not matches):
        has = f"there is no {kind} {name!r}" if name else f"there are several {kind}s"
        raise ValueError(f"{has} of the model; name one of {names} in target.{kind}")
    return matches[0] if matches else default


def _check_tensors(model_input: Tensor, model_output: Tensor, classes: int, access: str) -> None:
    """Raise ValueError unless images can be sent and the output has a score per class."""
    if model_input.datatype not in ("", *INPUTS):
        raise ValueError(
            f"the model's input {model_input.name} is {model_input.datatype}, and images are sent"
            f" as {', '.join(INPUTS)}"
        )
    if model_output.datatype in LABELS and access == "label":
        return
    if model_output.datatype and model_output.datatype not in OUTPUTS:
        raise ValueError(
            f"the model's output {model_output.name} is {model_output.datatype}, and scores are "
            f"{', '.join(OUTPUTS)}"
            + (
                f" (class numbers, {' or '.join(LABELS)}, are target.access=label)"
                if model_output.datatype in LABELS
                else ""
            )
        )
    if model_output.shape and not _fits(model_output.shape, (-1, classes or -1)):
        raise ValueError(
            f"the model's output {model_output.name} has the shape {model_output.shape} and should"
            f" have {[-1, classes]}: the images have {classes} classes, which must be the model's,"
            " in its order; target.classes names the classes of a model that has others"
        )


def _fits(theirs: list[int], ours: tuple[int, ...]) -> bool:
    return len(theirs) == len(ours) and all(
        -1 in pair or pair[0] == pair[1] for pair in zip(theirs[1:], ours[1:], strict=True)
    )


def _extensions(send: Send) -> list:
    try:
        listed = parsed(*send("GET", "/v2", None, {})).get("extensions")
    except ValueError:  # a gateway may let only the model's own addresses pass
        return []
    return listed if isinstance(listed, list) else []
