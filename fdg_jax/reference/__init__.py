"""Reference implementation of training with delayed gradients, from the equations.

With :math:`w_k^{(v)}` the weights of stage k after v updates and :math:`v_k(n)` the number of
updates of stage k before its forward of batch n, the gradient of batch n is the ordinary gradient
of the *whole* network at a tuple of weights of mixed age,

.. math::
    g(n) = \\nabla L_n\\left(w_0^{(v_0(n))}, \\dots, w_{K-1}^{(v_{K-1}(n))}\\right),

and stage k's update number v applies the mean of its parts of a set D of gradients,

.. math::
    w_k^{(v+1)} = w_k^{(v)} + U_k\\left(\\tfrac{1}{|D|} \\textstyle\\sum_{n \\in D} g_k(n)\\right).

If a gradient rule stores no weights ("recompute"), the versions are those of each stage's own
backward, and every stage gets the input of its forward: :math:`y - \\mathrm{sg}(y) + x` has the
value x and the gradient of y. If mini-batches are divided, n counts micro-batches.

If a rule estimates weights ("reconstruct"), those of the backward are

.. math::
    \\hat w_k = w_k - m \\, \\delta_k, \\qquad
    \\delta_k \\leftarrow \\gamma_k \\delta_k
    + (1 - \\gamma_k) (w_k^{(v+1)} - w_k^{(v)}), \\qquad \\gamma_k = D^{1 / \\tau_k}

with m the updates between the batch's forward and its backward, and :math:`\\tau_k` their largest
number in steady state.

If inputs are reconstructed ("reversible"), a stage is inverted at the newest weights, and the
gradient is taken at the reconstructed input,

.. math::
    \\tilde x_k = F_k^{-1}(\\tilde x_{k+1}, w_k), \\qquad
    (\\delta_k, g_k) = \\mathrm{vjp}_{F_k(\\cdot, w_k)}(\\tilde x_k)(\\delta_{k+1});

layers without an inverse use their stored input.

If cotangents are predicted, a stage's gradient is that of its own part of the network,

.. math::
    g_k(n) = \\left(\\partial h_k / \\partial w_k\\right)^T S_k(h_k, \\text{labels}).

If the loss of a part m of a mini-batch is a sum :math:`s_m` with a weight :math:`c_m`, that of the
mini-batch is :math:`\\sum_m s_m / \\sum_m c_m`, and its gradient likewise.

If an array is tied, a later stage uses the version of the owner's forward of the batch, for every
rule, and the gradient of that use is added to the owner's for the batch.

If stages have their own losses, :math:`L_n` is the stage's, and its input is constant.

If messages are encoded in fewer bits, a stage gets the rounded output of the previous stage, and
the previous stage the rounded cotangent; the rounding has the derivative 1.

The implementation is not fast, and shares with the pipeline only the layers, the rounding of
messages and the action stream.
"""

from fdg_jax.reference.delayed import train
from fdg_jax.reference.result import Result

__all__ = ["Result", "train"]
