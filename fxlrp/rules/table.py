"""Which kind every op is. A row that is missing is an error, never silently a gradient.

Ops are looked up by name, without namespace and overload, so that ``aten.add.Tensor`` and ``aten.add.Scalar``
share a row and a library's own ``grouped_mm`` is the same op as PyTorch's. The composite turns kinds into
rules.
"""

from __future__ import annotations

from typing import Any, Final

from .activation import RATIOS, op_name

#: Kinds of ops, in the words that composites and plans use.
KINDS: Final = {
    "linear": "affine maps with weights: linear, matmul with a constant, grouped and batched expert matmuls",
    "conv": "convolutions and transposed convolutions with constant weights",
    "add": "sums of tensors: residual connections, biases, embeddings",
    "structural": "views, permutations, slices, concatenation, casts, sums and means, constant scaling",
    "product": "elementwise products of two or more relevance-carrying factors",
    "matmul": "matrix products of two relevance-carrying operands",
    "division": "quotients whose denominator carries relevance",
    "attention": "softmax attention as one op",
    "attention_weights": "a softmax that is multiplied with values by a matmul and was not fused",
    "softmax": "any other softmax: routers, pooling weights",
    "norm": "LayerNorm, RMSNorm, GroupNorm",
    "activation": "elementwise f with f(0)=0, and x * g(x)",
    "gate": "elementwise f with f(0) != 0 that multiplies something that carries relevance",
    "nonlinear": "other differentiable nonlinear steps that have a Taylor rule: f(0) != 0 outside of gates",
    "solve": "triangular systems whose matrix carries relevance",
    "selection": "max, top-k, sorting, pooling by maximum, clamping: the winner takes all",
}

_LINEAR = """linear addmm addbmm addmv embedding_bag grouped_mm grouped_mm_fallback batch_norm
    native_batch_norm_legit_no_training cudnn_batch_norm"""
_CONV = "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution"
_ADD = "add sub rsub subtract"
_STRUCTURAL = """view reshape unsafe_view view_as reshape_as transpose permute t swapaxes movedim moveaxis
    unsqueeze squeeze expand expand_as contiguous clone alias to to_copy type_as slice select narrow split
    split_with_sizes chunk tensor_split unbind cat concat concatenate stack flatten unflatten repeat
    repeat_interleave tile roll flip gather index index_select take take_along_dim index_put
    index_add index_copy index_fill scatter scatter_add scatter_reduce select_scatter slice_scatter
    diagonal diag_embed as_strided pad constant_pad_nd reflection_pad1d reflection_pad2d
    replication_pad1d replication_pad2d masked_fill masked_scatter masked_select where tril triu sum
    mean cumsum neg negative dropout feature_dropout alpha_dropout view_as_real view_as_complex real
    imag complex conj resolve_conj unfold im2col col2im avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d upsample_nearest1d
    upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_bicubic2d_aa
    upsample_bilinear2d_aa upsample_trilinear3d upsample_nearest3d upsample_nearest_exact1d
    upsample_nearest_exact2d upsample_nearest_exact3d upsample_linear1d pixel_shuffle
    pixel_unshuffle channel_shuffle fft_fft fft_ifft fft_fftn fft_ifftn fft_rfft fft_irfft copy
    lift_fresh_copy broadcast_to getitem segment_reduce trace rot90 positive select_index select_rows
    diff atleast_1d atleast_2d atleast_3d hstack vstack dstack nan_to_num ravel zero fill numpy_T mT
    mH adjoint matrix_H rad2deg"""
_PRODUCT = "mul multiply"
_MATMUL = """matmul mm bmm mv dot einsum bilinear outer ger inner cross linalg_cross tensordot
    chain_matmul linalg_multi_dot kron"""
_SOLVE = "linalg_solve_triangular"
_DIVISION = "div divide true_divide"
_ATTENTION = "attention scaled_dot_product_attention"
_SOFTMAX = "softmax safe_softmax"
_NORM = "layer_norm rms_norm group_norm normalize normalize_divide"
_GATE = """sigmoid softplus exp exp2 log_sigmoid hardsigmoid cos rsqrt sqrt reciprocal log log2 log10
    logsumexp log_softmax acos asin atan atan2 sinh cosh tan logit erfc erfinv linalg_vector_norm norm
    std var
    var_mean std_mean cumprod linalg_norm atanh asinh acosh logaddexp cdist
    threshold hypot prod"""
_SELECTION = """max min maximum minimum amax amin topk sort median kthvalue max_pool1d max_pool2d max_pool3d
    adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices clamp clamp_min clamp_max clip fmax fmin
    mode cummax cummin nanmedian msort aminmax"""

#: Op name -> kind, as one flat table.
OP_KINDS: Final[dict[str, str]] = {
    **dict.fromkeys((*RATIOS, "self_gate"), "activation"),
    **{
        name: kind
        for kind, names in {
            "linear": _LINEAR,
            "conv": _CONV,
            "add": _ADD,
            "structural": _STRUCTURAL,
            "product": _PRODUCT,
            "matmul": _MATMUL,
            "division": _DIVISION,
            "attention": _ATTENTION,
            "softmax": _SOFTMAX,
            "norm": _NORM,
            "gate": _GATE,
            "solve": _SOLVE,
            "selection": _SELECTION,
        }.items()
        for name in names.split()
    },
}

#: Kinds that are affine in one active operand and multilinear in several.
MULTILINEAR: Final = frozenset({"linear", "conv", "product", "matmul"})


def kind_of(op: Any) -> str | None:
    """The kind of an op, or None where no row covers it."""
    return OP_KINDS.get(op_name(op))
