"""What ATen operations mean here: which carry weights, which only rearrange, which are attention,
norms, activations.

One table for both readers: export keeps whole operations (`linear`, `layer_norm`), hooks see what
they are made of (`addmm`, `native_layer_norm`). An operation that no table names keeps its own name
as its kind, so that nothing is ever "other".
"""

from __future__ import annotations

import math

from .trace import Call

#: rearrange, cut or copy their first tensor: no arithmetic, so they are folded into edges
LAYOUT = frozenset(
    """getitem repeat_interleave view view_as _unsafe_view reshape reshape_as transpose transpose_ t
    t_ mT mH numpy_T adjoint swapaxes swapdims permute movedim moveaxis flatten unflatten ravel
    squeeze squeeze_ unsqueeze unsqueeze_ expand expand_as broadcast_to slice select narrow chunk
    split split_with_sizes tensor_split unsafe_split unsafe_chunk unbind diagonal as_strided unfold
    contiguous clone alias detach detach_ to _to_copy type_as lift_fresh lift_fresh_copy
    view_as_real view_as_complex real imag resolve_conj resolve_neg repeat tile roll flip rot90 pad
    constant_pad_nd reflection_pad2d replication_pad2d replication_pad3d dropout dropout_
    feature_dropout native_dropout _reshape_alias atleast_1d atleast_2d hsplit vsplit dsplit cpu
    cuda float half bfloat16 view_copy slice_copy unfold_copy""".split()
)
#: take a tensor's shape and not its values
SHAPES = frozenset(
    (
        "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones "
        "new_empty new_full new_empty_strided"
    ).split()
)
#: element by element; folded where a single operation and constants enter
ADDITIONS = frozenset("add sub rsub subtract lerp addcmul addcdiv".split())
PRODUCTS = frozenset("mul multiply div divide true_divide".split())
ELEMENTWISE = (
    ADDITIONS
    | PRODUCTS
    | frozenset(
        """neg pow sqrt rsqrt reciprocal abs clamp clamp_min clamp_max maximum minimum where
        masked_fill nan_to_num floor round ceil trunc remainder floor_divide fill index_fill index
        index_select gather take_along_dim eq ne lt le gt ge logical_not logical_and logical_or
        bitwise_not bitwise_and bitwise_or square float_power conj complex polar triu
        tril""".split()
    )
)
#: make one tensor of several; so do writes into parts of one
CONCATENATIONS = frozenset(
    (
        "cat concat concatenate stack hstack vstack dstack copy index_put slice_scatter "
        "select_scatter"
    ).split()
)
ACTIVATIONS = frozenset(
    """silu gelu relu relu6 sigmoid tanh leaky_relu elu selu celu hardswish hardsigmoid hardtanh
    softplus softsign mish glu prelu log_sigmoid log_sigmoid_forward rrelu threshold erf""".split()
)
NORMS = frozenset(
    """layer_norm group_norm batch_norm instance_norm rms_norm local_response_norm native_layer_norm
    native_group_norm native_batch_norm _fused_rms_norm _native_batch_norm_legit_no_training
    cudnn_batch_norm""".split()
)
SOFTMAXES = frozenset("softmax _softmax _safe_softmax special_softmax".split())
REDUCTIONS = frozenset(
    (
        "mean sum var std var_mean std_mean norm linalg_vector_norm linalg_norm amax amin "
        "nansum logsumexp"
    ).split()
)
ATTENTIONS = frozenset(
    """scaled_dot_product_attention _scaled_dot_product_flash_attention
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention
    _scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable
    _scaled_dot_product_attention_math flex_attention""".split()
)
MATMULS = frozenset("matmul mm bmm addmm addbmm baddbmm einsum mv dot _grouped_mm linear".split())
CONVOLUTIONS = frozenset(
    (
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
        "_convolution"
    ).split()
)
EMBEDDINGS = frozenset("embedding embedding_bag".split())
RESAMPLES = frozenset(
    """upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d
    upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_bilinear2d_aa
    _upsample_bicubic2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool3d pixel_shuffle
    pixel_unshuffle max_pool2d_with_indices""".split()
)
#: checks and bookkeeping, which make no tensor
IGNORED = frozenset(
    (
        "_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range_for_size "
        "sym_constrain_range sym_size _local_scalar_dense is_nonzero"
    ).split()
)
#: of `LAYOUT`, those whose result is other memory: writing into it leaves the first tensor as it is
COPIES = frozenset(
    """contiguous clone to _to_copy type_as lift_fresh lift_fresh_copy repeat tile roll flip rot90
    pad constant_pad_nd reflection_pad2d replication_pad2d replication_pad3d dropout feature_dropout
    native_dropout cpu cuda float half bfloat16 view_copy slice_copy unfold_copy
    repeat_interleave""".split()
)


def plain(op: str) -> str:
    """The name without the underscore of an operation in place, and with one name for each overload
    of resampling.
    """
    return op[:-1] if op.endswith("_") and not op.endswith("__") else op


def in_place(op: str) -> bool:
    """Whether the operation writes into its first argument."""
    return plain(op) != op and op not in LAYOUT


def kind_of(op: str) -> str:
    """Kind of an operation that carries no weight: attention, matmul, norm, activation, add,
    multiply, concat, resample, or its own name.
    """
    name = plain(op)
    for kind, names in (
        ("attention", ATTENTIONS),
        ("matmul", MATMULS),
        ("softmax", SOFTMAXES),
        ("norm", NORMS),
        ("activation", ACTIVATIONS),
        ("add", ADDITIONS),
        ("multiply", PRODUCTS),
        ("concat", CONCATENATIONS),
        (
            "resample",
            RESAMPLES | CONVOLUTIONS,
        ),  # a convolution without parameters is a fixed filter
    ):
        if name in names:
            return kind
    return name.strip("_")


def weight_kind(call: Call, weight: Call) -> str:
    """linear, conv2d, conv-transpose2d, …, embedding: kind of a layer with that weight."""
    name = plain(call.op)
    if name in EMBEDDINGS:
        return "embedding"
    if name in CONVOLUTIONS:
        transposed = "transpose" in name or bool(call.arguments.get("transposed"))
        return f"conv{'-transpose' if transposed else ''}{len(weight.shape) - 2}d"
    return "linear"


def operands(call: Call) -> tuple[Call, ...]:
    """The two factors of a matrix product, the bias of addmm left out."""
    names = (
        "mat1",
        "mat2",
        "batch1",
        "batch2",
        "input",
        "weight",
        "vec",
        "tensor",
        "other",
        "mat_a",
        "mat_b",
    )
    if plain(call.op) == "einsum":
        return call.given[:2]
    found = tuple(a for n, a in call.arguments.items() if n in names and isinstance(a, Call))
    self = call.arguments.get("self")
    return (self, *found)[:2] if isinstance(self, Call) and len(found) < 2 else found[:2]


def macs(call: Call) -> int:
    """Multiply-accumulates of products, convolutions and attention, counted as torch's
    FlopCounterMode does; 0 for all else.
    """
    name, arguments = plain(call.op), call.arguments
    if name in ATTENTIONS:
        query, key, value = call.given[:3]
        return query.numel // query.shape[-1] * key.shape[-2] * (query.shape[-1] + value.shape[-1])
    if name in CONVOLUTIONS:
        given, weight = call.given[:2]
        transposed = "transpose" in name or bool(arguments.get("transposed"))
        # A convolution applies its kernel at each output place, a transposed one at each input
        # place.
        return (given.numel if transposed else call.numel) * math.prod(weight.shape[1:])
    if name == "einsum":
        return _einsum(str(arguments.get("equation")), call.given)
    if name in MATMULS:
        pair = operands(call)
        return call.numel * pair[0].shape[-1] if len(pair) == 2 else 0
    return 0


def _einsum(equation: str, given: tuple[Call, ...]) -> int:
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, call in zip(terms, given, strict=False):
        letters = term.replace("...", "")
        sizes.update(zip(letters, call.shape[-len(letters) :] if letters else (), strict=False))
    # Dimensions behind an ellipsis are shared by all operands; the largest of them counts.
    hidden = max(
        (
            call.numel // math.prod(sizes[x] for x in t.replace("...", ""))
            for t, call in zip(terms, given, strict=False)
            if "..." in t
        ),
        default=1,
    )
    return math.prod(sizes.values()) * hidden if len(terms) > 1 else 0


def axis_of(call: Call, name: str = "dim", default: int = 0) -> int:
    """A dimension argument, counted from the front of the first tensor that the call reads."""
    value = call.arguments.get(name, default)
    value = value[0] if isinstance(value, list | tuple) and value else value
    rank = len(call.given[0].shape) if call.given else 0
    return int(value) % rank if isinstance(value, int) and rank else 0
