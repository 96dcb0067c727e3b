"""The operators that the graphs of files may call.

A file is data: its graphs are rebuilt from the operators below, which compute tensors of tensors,
and from nothing else. They read no file, hold no pointer in a tensor, and check what they index.
Operators that are not here, say of a library's own kernels, are refused when a program is saved
and when it is loaded, unless the process that does it allows them:

    diffopt.core.allow_operators("mylib::attention")
"""

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch

from diffopt.errors import DiffoptError

_PYTHON = {
    "getitem": operator.getitem,
    "add": operator.add,
    "mul": operator.mul,
}
"""Functions of Python's `operator` that graphs call, on tuples of results and on sizes."""

_REGISTER = {"quantized_decomposed": "diffopt.ir.qdq", "diffopt": "diffopt.ir.qdq"}
"""The module that registers the operators of a namespace."""

_ATEN = frozenset(
    """
    absolute adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d addbmm addmv addr adjoint affine_grid_generator alias_copy all aminmax
    arccos arccosh arcsin arcsinh arctan arctan2 arctanh argsort as_strided_copy
    as_strided_scatter atleast_1d atleast_2d atleast_3d baddbmm bartlett_window batch_norm
    bernoulli bilinear bincount blackman_window block_diag broadcast_tensors broadcast_to
    bucketize cartesian_prod cdist chain_matmul channel_shuffle cholesky cholesky_inverse
    cholesky_solve chunk column_stack combinations complex concat concatenate conj contiguous
    conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d corrcoef
    cosine_similarity count_nonzero cov cross cummax cummin cumprod cumulative_trapezoid det
    detach detach_copy diag diag_embed diagflat diagonal_copy diagonal_scatter diff dist divide
    dot dropout dsplit dstack einsum empty_like empty_permuted expand_as expand_copy eye fft_fft
    fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2
    fft_ifftn fft_ifftshift fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn
    fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fix flatten fliplr flipud floor_divide
    frobenius_norm ger glu gradient greater greater_equal grid_sampler grid_sampler_3d
    group_norm hamming_window hann_window hardswish histc hsplit hstack im2col imag item
    index_add index_copy index_fill index_reduce inner instance_norm inverse isclose isin isreal
    istft kaiser_window kron kthvalue layer_norm less less_equal lift lift_fresh lift_fresh_copy
    linalg_cholesky linalg_cholesky_ex linalg_cross linalg_det linalg_diagonal linalg_eig
    linalg_eigh linalg_eigvals linalg_eigvalsh linalg_householder_product linalg_inv
    linalg_inv_ex linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve
    linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_multi_dot
    linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex
    linalg_solve_triangular linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve
    linalg_vander linalg_vecdot linalg_vector_norm linear linspace log_sigmoid
    log_sigmoid_forward log_softmax logcumsumexp logdet logspace logsumexp lu_solve lu_unpack mH
    mT masked_select matmul matrix_H matrix_exp matrix_power max_pool1d max_pool1d_with_indices
    max_pool2d max_pool3d median meshgrid mode moveaxis movedim msort mse_loss multinomial
    multiply mv nanmean nanmedian nanquantile nansum narrow narrow_copy native_batch_norm
    native_channel_shuffle negative new_empty new_empty_strided new_full new_ones new_zeros norm
    normal normal_functional not_equal nuclear_norm numpy_T one_hot ones ones_like outer pad
    pad_sequence pairwise_distance pdist permute_copy pinverse pixel_shuffle pixel_unshuffle
    poisson polar prelu put qr quantile rand_like randint randint_like randn_like range ravel
    real renorm repeat_interleave replication_pad1d reshape reshape_as resolve_conj resolve_neg
    rms_norm roll rot90 row_stack scaled_dot_product_attention searchsorted select_copy
    slice_copy slice_inverse slogdet slow_conv3d slow_conv_dilated2d slow_conv_dilated3d
    slow_conv_transpose2d slow_conv_transpose3d softmax special_digamma special_erf special_erfc
    special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc
    special_gammaln special_i0 special_log1p special_log_softmax special_logit special_logsumexp
    special_multigammaln special_ndtr special_polygamma special_psi special_round special_sinc
    special_softmax special_xlogy split split_copy split_with_sizes_copy squeeze_copy stack std
    std_mean stft subtract sum_to_size svd swapaxes swapdims t t_copy take take_along_dim
    tensor_split tensordot tile to trace transpose transpose_copy trapezoid trapz tril
    tril_indices triplet_margin_loss triu triu_indices type_as unbind unbind_copy unflatten
    unfold unfold_copy unique_consecutive unique_dim unsafe_chunk unsafe_split
    unsafe_split_with_sizes unsqueeze_copy upsample_bicubic2d upsample_linear1d
    upsample_nearest1d upsample_nearest3d upsample_trilinear3d vander var_mean vdot view_as
    view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit vstack
    zero zeros zeros_like
    __and__ __or__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_tensor_metadata
    _cdist_forward _conj _conj_copy _convolution _euclidean_dist _fft_c2c _fft_c2r _fft_r2c
    _fused_rms_norm _grouped_mm _int_mm _is_all_true _is_any_true _linalg_det _linalg_eigh
    _linalg_eigvals _linalg_slogdet _linalg_solve_ex _linalg_svd _local_scalar_dense
    _log_softmax _logcumsumexp _native_batch_norm_legit _native_batch_norm_legit_functional
    _native_batch_norm_legit_no_training _neg_view _neg_view_copy _pad_circular _pad_enum
    _prelu_kernel _reshape_alias _reshape_alias_copy _reshape_copy _safe_softmax
    _scaled_dot_product_attention_math _scaled_dot_product_efficient_attention
    _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_cudnn_attention _scaled_mm _softmax _stack _to_copy _trilinear _unique2
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm _weight_norm_interface
    """.split()  # noqa: SIM905
)
"""Of aten's, beside those that torch tags as its core or as pointwise."""

_NAMESPACES: dict[str, frozenset[str]] = {
    "diffopt": frozenset(("unpack_int4",)),
    "quantized_decomposed": frozenset(
        f"{verb}_per_{part}"
        for verb in ("quantize", "dequantize")
        for part in ("tensor", "channel", "channel_group", "token")
    )
    | {"choose_qparams", "choose_qparams_symmetric", "choose_qparams_per_token"},
}
"""Operators of other namespaces."""

_TEXT_ARGUMENTS = frozenset(
    ("approximate", "equation", "indexing", "mode", "norm", "ord", "padding", "padding_mode")
) | {"padding_side", "reduce", "rounding_mode", "interpolation", "side", "driver", "UPLO"}
"""Names of arguments that are texts: no file's name and no address is among them."""

_VALUES = ("Tensor", "int", "float", "bool", "number")
"""What operators return, or lists of it."""

_allowed: set[str] = set()


def allow_operators(*names: str) -> None:
    """Let files call these operators in this process, besides diffopt's own list.

    Args:
        names: As torch writes them: "mylib::attention".
    """
    for name in names:
        space, _, packet = name.partition("::")
        if not (space.isidentifier() and packet.isidentifier()):
            raise DiffoptError(f"{name!r} names no operator; write it as torch does: 'mylib::name'")
        _allowed.add(f"{space}.{packet}")


def is_allowed(target: Any) -> bool:
    """Tell whether a file may hold a call of an operator or of a function of Python's."""
    if isinstance(target, torch._ops.OpOverload):
        return _is_allowed(target) or str(target).rpartition(".")[0] in _allowed
    return any(target is known for known in _PYTHON.values())


@functools.cache
def _is_allowed(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operator is on the list; its schema must agree that it only computes."""
    space, packet, _ = str(target).split(".")
    if space == "aten":
        is_known = packet in _ATEN or not {torch.Tag.core, torch.Tag.pointwise}.isdisjoint(
            tag for overload in _overloads(target) for tag in overload.tags
        )
    else:
        is_known = packet in _NAMESPACES.get(space, ())
    schema = target._schema
    texts = [each for each in schema.arguments if "str" in str(each.type)]
    returned = [str(each.type).removeprefix("List[").rstrip("]") for each in schema.returns]
    return (
        is_known
        and not schema.is_mutable
        and all(each.name in _TEXT_ARGUMENTS for each in texts)
        and all(kind in _VALUES for kind in returned)
    )


def _overloads(target: torch._ops.OpOverload) -> list[torch._ops.OpOverload]:
    """Return all overloads of an operator: torch tags some of them."""
    packet = target.overloadpacket
    return [getattr(packet, name) for name in packet.overloads()]


def find_target(name: str) -> Callable[..., Any]:
    """Return the operator called `name`; an unknown one, or another, is a `DiffoptError`."""
    space, packet = _parts(name)[:2]
    if space not in ("operator", "aten", *_NAMESPACES) and f"{space}.{packet}" not in _allowed:
        raise _refused(name, space, packet)
    target = find_any(name)
    expect_allowed(target)
    return target


def find_any(name: str) -> Callable[..., Any]:
    """Return the operator called `name`, whatever it does: for graphs beside machine code.

    Targets write kernels of torch's libraries into the graphs that they compile and prepare weights
    with; who runs the file's machine code trusts them as well.
    """
    space, packet, overload = _parts(name)
    if space == "operator":
        return _PYTHON[packet]
    if space in _REGISTER:
        importlib.import_module(_REGISTER[space])
    try:
        target = getattr(getattr(getattr(torch.ops, space), packet), overload)
    except (AttributeError, RuntimeError):
        raise DiffoptError(
            f"the file needs the operator {name!r}, which this torch {torch.__version__} does not"
            " have; load it with the torch version that wrote it"
        ) from None
    if not isinstance(target, torch._ops.OpOverload):
        raise _refused(name, space, packet)
    return target


def _parts(name: str) -> tuple[str, str, str]:
    space, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    parts = (space, packet, overload)
    is_name = rest in _PYTHON if space == "operator" else all(map(str.isidentifier, parts))
    if not is_name:
        raise DiffoptError(f"{name[:80]!r} is no operator that a file may call")
    return parts


def expect_allowed(target: Any) -> None:
    """Raise a `DiffoptError` for an operator or a function that no file may call."""
    if not is_allowed(target):
        name = str(target) if isinstance(target, torch._ops.OpOverload) else repr(target)
        raise _refused(name, *f"{name}.".split(".")[:2])


def _refused(name: str, space: str, packet: str) -> DiffoptError:
    return DiffoptError(
        f"no file may call the operator {name!r}; if you trust it, import what registers it and"
        f' call diffopt.core.allow_operators("{space}::{packet}") before saving and before loading'
    )
