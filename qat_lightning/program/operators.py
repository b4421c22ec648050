"""The operators that a program may use: they compute and do nothing else."""

_SHAPES = """
prim::NumToTensor prim::ListUnpack aten::Int.Tensor aten::IntImplicit aten::ScalarImplicit aten::Float.Tensor aten::size.int aten::size
aten::floor_divide aten::floor_divide.Scalar aten::alias aten::detach aten::clone aten::contiguous aten::to.dtype aten::to.device
aten::to.other aten::type_as aten::view aten::reshape aten::flatten.using_ints aten::unflatten.int aten::permute aten::transpose.int
aten::t aten::squeeze aten::squeeze.dim aten::unsqueeze aten::expand aten::expand_as aten::repeat aten::slice.Tensor aten::select.int
aten::index.Tensor aten::index_select aten::gather aten::chunk aten::split.Tensor aten::split.sizes aten::split_with_sizes
aten::unbind.int aten::cat aten::stack aten::roll aten::flip aten::pad aten::constant_pad_nd aten::narrow aten::movedim.int
aten::pixel_shuffle aten::channel_shuffle aten::masked_fill.Scalar aten::masked_fill_.Scalar aten::where.self aten::tensor_split.sections
aten::arange aten::arange.start aten::zeros aten::ones aten::full aten::zeros_like aten::ones_like aten::full_like aten::new_zeros
aten::new_ones aten::new_full aten::broadcast_tensors aten::one_hot
"""
_ARITHMETIC = """
aten::add.Tensor aten::add.Scalar aten::add_.Tensor aten::add_.Scalar aten::sub.Tensor aten::sub.Scalar aten::sub_.Tensor
aten::rsub.Scalar aten::rsub.Tensor aten::mul.Tensor aten::mul.Scalar aten::mul_.Tensor aten::mul_.Scalar aten::div.Tensor
aten::div.Scalar aten::div_.Tensor aten::neg aten::abs aten::exp aten::log aten::sqrt aten::rsqrt aten::pow.Tensor_Scalar aten::sin
aten::cos aten::erf aten::reciprocal aten::maximum aten::minimum aten::clamp aten::clamp_ aten::clamp_min aten::clamp_max aten::matmul
aten::bmm aten::mm aten::addmm aten::einsum aten::baddbmm aten::linear aten::sum aten::sum.dim_IntList aten::mean aten::mean.dim
aten::amax aten::amin aten::max aten::max.dim aten::min.dim aten::argmax aten::var.dim aten::var.correction aten::norm.ScalarOpt_dim
aten::linalg_vector_norm aten::cumsum aten::eq.Scalar aten::eq.Tensor aten::ne.Scalar aten::ne.Tensor aten::gt.Scalar aten::lt.Scalar
aten::ge.Scalar aten::le.Scalar aten::lt.Tensor aten::gt.Tensor aten::logical_not aten::logical_and aten::logical_or aten::bitwise_not
aten::round aten::round_ aten::floor aten::ceil
"""
_LAYERS = """
aten::relu aten::relu_ aten::relu6 aten::relu6_ aten::hardtanh aten::hardtanh_ aten::hardswish aten::hardswish_ aten::hardsigmoid
aten::hardsigmoid_ aten::sigmoid aten::sigmoid_ aten::tanh aten::tanh_ aten::silu aten::silu_ aten::gelu aten::mish aten::softplus
aten::leaky_relu aten::leaky_relu_ aten::elu aten::elu_ aten::prelu aten::selu aten::glu aten::softmax.int aten::log_softmax.int
aten::dropout aten::dropout_ aten::feature_dropout aten::embedding aten::embedding_bag aten::layer_norm aten::group_norm aten::batch_norm
aten::instance_norm aten::rms_norm aten::local_response_norm aten::_convolution aten::convolution aten::conv1d aten::conv2d aten::conv3d
aten::conv1d.padding aten::conv2d.padding aten::conv_transpose1d aten::conv_transpose2d.input aten::conv_transpose3d.input
aten::max_pool1d aten::max_pool2d aten::max_pool3d aten::avg_pool1d aten::avg_pool2d aten::avg_pool3d aten::adaptive_avg_pool1d
aten::adaptive_avg_pool2d aten::adaptive_avg_pool3d aten::adaptive_max_pool2d aten::upsample_nearest2d aten::upsample_nearest2d.vec
aten::upsample_bilinear2d aten::upsample_bilinear2d.vec aten::scaled_dot_product_attention aten::lstm.input aten::gru.input
"""
_QUANTIZED = """
aten::_make_per_channel_quantized_tensor aten::_make_per_tensor_quantized_tensor aten::quantize_per_tensor
aten::quantize_per_tensor.tensor_qparams aten::dequantize.self quantized::conv1d quantized::conv1d_relu quantized::conv2d.new
quantized::conv2d_relu.new quantized::conv3d.new quantized::conv3d_relu.new quantized::linear quantized::linear_relu
quantized::linear_dynamic quantized::linear_relu_dynamic aten::quantized_lstm.input aten::quantized_gru.input quantized::add
quantized::add_relu quantized::add.Scalar quantized::add_scalar quantized::mul quantized::mul_relu quantized::mul.Scalar
quantized::mul_scalar quantized::mul_scalar_relu quantized::add_scalar_relu quantized::cat quantized::cat_relu quantized::hardswish
quantized::sigmoid quantized::leaky_relu quantized::softmax quantized::matmul quantized::layer_norm quantized::group_norm
quantized::instance_norm quantized::batch_norm quantized::batch_norm1d quantized::batch_norm2d quantized::batch_norm2d_relu
quantized::batch_norm_relu quantized::relu6 quantized::conv_transpose1d
"""
OPERATORS = frozenset(f"{_SHAPES} {_ARITHMETIC} {_LAYERS} {_QUANTIZED}".split())
"""By name with overload. None reads a file, draws random numbers, or runs code of its own."""
