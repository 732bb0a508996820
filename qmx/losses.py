"""Losses: pure functions of arrays, one value per example; the caller takes the mean.

No networks, no parameters, no reductions over the batch. All run in float32 whatever comes
in, unless that is float64.
"""

import jax
import jax.numpy as jnp
import optax

from qmx.contract import wide


def info_nce(
    q: jax.Array, k: jax.Array, queue: jax.Array, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """InfoNCE of queries against their own key and a queue of negatives.

    He et al. 2020 (MoCo), equation 1: -log exp(q.k+ / T) / sum_i exp(q.k_i / T), the sum over the
    positive and the K entries of the queue.

    Args:
      q: f32[B, D], unit rows.
      k: f32[B, D], unit rows; row i is the positive of query i.
      queue: f32[K, D], unit rows; the negatives.
      temperature: T > 0.

    Returns:
      (loss f32[B], logits f32[B, 1 + K]); the positive stands in column 0.
    """
    q, k, queue = (wide(x) for x in (q, k, queue))
    positive = jnp.sum(q * k, axis=-1, keepdims=True)
    negative = jnp.matmul(q, queue.T, precision="highest")  # not TF32: these are divided by T
    logits = jnp.concatenate([positive, negative], axis=-1) / temperature
    return -jax.nn.log_softmax(logits)[:, 0], logits


def negative_cosine(p: jax.Array, z: jax.Array) -> jax.Array:
    """-cos(p, z) for each row; f32[B] from two f32[B, D]. Chen & He 2021 (SimSiam), equation 1.

    -1 for equal directions, +1 for opposite ones. The gradient passes through the norms, also
    those of p; where z is a constant, stop its gradient before the call.
    """
    # torch's cosine similarity guards with the same epsilon.
    return -optax.losses.cosine_similarity(wide(p), wide(z), epsilon=1e-8)


def check_scores(target: jax.Array, student: jax.Array) -> None:
    """Raise ValueError unless both are [B, N]: others would be broadcast, and learned."""
    if target.shape != student.shape or student.ndim != 2:
        raise ValueError(
            f"scores are {list(target.shape)} and the student's {list(student.shape)}; both must be"
            " [B, N], and of labels the scores are the logarithm of one-hot rows,"
            " numpy.log(numpy.eye(N)[labels])"
        )


def kl_target_student(
    target: jax.Array,
    student: jax.Array,
    target_temperature: float = 1.0,
    student_temperature: float = 1.0,
) -> jax.Array:
    """KL(softmax(target / T_t) || softmax(student / T_s)) x T_s^2, in nats; f32[B].

    With T_s = 1 this is the one-sided form of Jagielski et al. 2020 (T_t = 1.5 there); with
    T_t = T_s = T it is Hinton et al. 2015, whose T^2 keeps the gradient's size independent of T.

    Args:
      target: f32[B, N], unnormalised log-probabilities. -inf is a class of probability 0, so
        the logarithm of a one-hot row is a hard label, which no temperature changes.
      student: f32[B, N], finite logits.

    Raises:
      ValueError: the shapes differ.
    """
    check_scores(target, student)
    log_q = jax.nn.log_softmax(wide(student) / student_temperature)
    p = jax.nn.softmax(target.astype(log_q.dtype) / target_temperature)
    return optax.losses.kl_divergence(log_q, p) * student_temperature**2


def soft_cross_entropy(
    target: jax.Array, student: jax.Array, target_temperature: float = 1.0
) -> jax.Array:
    """-sum_c softmax(target / T)_c log softmax(student)_c, in nats; f32[B] from two f32[B, N].

    The KL divergence plus the target's own entropy: the same gradient, and for hard labels (see
    `kl_target_student`) the usual cross-entropy.

    Raises:
      ValueError: the shapes differ.
    """
    check_scores(target, student)
    student = wide(student)
    p = jax.nn.softmax(target.astype(student.dtype) / target_temperature)
    return optax.losses.softmax_cross_entropy(student, p)
