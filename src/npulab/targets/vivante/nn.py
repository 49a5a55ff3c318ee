"""The NN (convolution) engine's job descriptor: 34 words that name one convolution.

Facts from reading the open driver and the vendor kernel driver's self-tests (field names, constants), gathered in the
project's Vivante NN notes, section 6. A field whose meaning is inferred and not proven on silicon says "inferred".
"""

from __future__ import annotations

from npulab.bits import Layout, field

DESCRIPTOR_BYTES = 136
"""34 words. The hardware's native size is 128 bytes; the driver allocates two words more."""

POOLING_NONE, POOLING_MAX, POOLING_AVERAGE, POOLING_FIRST_PIXEL = range(4)
CACHE_NONE, CACHE_FULL, CACHE_PARTIAL = range(3)
NO_CIRCULAR_BUFFER = 0x03FFFFFF
PLUS_INFINITY, MINUS_INFINITY = 0x7F800000, 0xFF800000


class NNDescriptor(Layout, words=34, source="Mesa 25.0.7 etnaviv_ml_nn; vendor kernel driver (NN notes 6.1)"):
    """One convolution job. HW x is the tensor's width, HW y its height; tensors are planes of bytes."""

    layer_type: int = field("w0[0]", default=0, doc="0 convolution, 1 fully connected (never set: run as convolution)")
    no_z_offset: int = field("w0[1]", default=0, doc="0 on v7, 1 on v8")
    kernel_x: int = field("w0[2:5]", unit="taps")
    kernel_z: int = field("w0[6:19] w5[26:31]", doc="input channels the engine sees")
    kernels_per_core: int = field("w0[20:26]", doc="kernels a core takes in one superblock")
    pooling: int = field("w0[27:28]", default=0, doc="0 none, 1 max, 2 average, 3 first pixel of each 2x2")
    pooling_xy_size: int = field("w0[29]", default=1, doc="0 is 2x2, 1 is 3x3 (inferred)")
    prelu: int = field("w0[30]", default=0)
    nn_layer_flush: int = field("w0[31]", default=1, doc="last layer")
    kernel_data_type: int = field("w1[0:1] w15[19]", default=0, doc="0 is unsigned 8 bit")
    in_data_type: int = field("w1[2:3] w15[20]", default=0, doc="0 is unsigned 8 bit")
    out_data_type: int = field("w1[4:5] w15[21]", default=0, doc="0 is unsigned 8 bit")
    in_x_size: int = field("w1[6:18]", unit="px")
    in_y_size: int = field("w1[19:31]", unit="px")
    in_x_offset: int = field("w2[0:2] w4[16]", default=0, signed=True, unit="px", doc="minus the padding on the left")
    in_y_offset: int = field("w2[3:5] w4[17]", default=0, signed=True, unit="px", doc="minus the padding on top")
    in_x_offset_bit4: int = field("w18[29]", default=0, doc="fifth offset bit, v8 only (inferred)")
    in_y_offset_bit4: int = field("w18[30]", default=0, doc="fifth offset bit, v8 only (inferred)")
    brick_mode: int = field("w2[7]", default=0)
    brick_distance: int = field("w2[8:23]", default=0)
    relu: int = field("w2[24]", default=0, doc="clamp below at the output zero point")
    post_multiplier: int = field("w2[26] w15[22:27] w17[24:31] w22[18:25]", doc="fraction bits of the scale; 15 on v7")
    post_shift: int = field("w2[27:31] w15[28:29]", doc="right shift after the multiply")
    no_flush: int = field("w3[3]", default=0, doc="0 on v7, 1 on v8")
    out_x_size: int = field("w3[6:18]", unit="px", doc="doubled when only first pixels are kept")
    out_y_size: int = field("w3[19:31]", unit="px", doc="doubled when only first pixels are kept")
    out_z_size: int = field("w4[0:13]", doc="output channels")
    rounding_mode: int = field("w4[14:15]", default=1, doc="1 is round to nearest (proven by the vendor self-test)")
    out_tile_x: int = field("w4[18:24]", unit="px")
    out_tile_y: int = field("w4[25:31]", unit="px")
    kernel_address: int = field("w5[0:25]", scale=64, unit="B", doc="coefficient buffer")
    in_image_address: int = field("w6", unit="B")
    out_image_address: int = field("w7", unit="B")
    image_caching_mode: int = field("w8[0:1]", default=0, doc="0 none, 1 full, 2 partial")
    kernel_caching_mode: int = field("w8[2:3]", default=0, doc="0 none, 1 full, 2 partial")
    partial_cache_data_unit: int = field("w8[4:5]", default=0)
    kernel_pattern_msb: int = field("w8[6:11]", default=0, doc="length - 1 of the partial caching pattern (inferred)")
    kernel_y: int = field("w8[12:15]", unit="taps")
    out_y_stride: int = field("w8[16:31]", unit="rows", doc="rows of one output plane")
    kernel_pattern: int = field("w9 w10", default=0, doc="which coefficient units come from SRAM (inferred)")
    kernel_cache_start: int = field("w11", default=0x800, unit="B", doc="offset in VIP SRAM")
    kernel_cache_end: int = field("w12", default=0, unit="B", doc="offset in VIP SRAM")
    image_cache_start: int = field("w13", default=0, unit="B", doc="offset in VIP SRAM")
    image_cache_end: int = field("w14", default=0x800, unit="B", doc="offset in VIP SRAM")
    in_border_mode: int = field("w15[0:1]", default=0, doc="0 is constant")
    in_border_const: int = field("w15[2:17]", doc="what a tap outside the input reads: the input zero point")
    in_x_stride: int = field("w16[0:15]", unit="B", doc="bytes of one input row")
    in_y_stride: int = field("w16[16:31]", unit="rows", doc="rows of one input plane")
    out_x_stride: int = field("w17[0:15]", unit="B", doc="bytes of one output row")
    out_circular_buf_size: int = field("w18[0:25]", default=0, scale=64, unit="B")
    per_channel_post_mul: int = field("w18[26]", default=0)
    slow_output: int = field("w18[28]", default=0, doc="set by the vendor's i.MX8MP self-test (inferred name)")
    out_circular_buf_end: int = field("w19[0:25]", default=NO_CIRCULAR_BUFFER, doc="end + 1, in 64 B")
    in_circular_buf_size: int = field("w20[0:25]", default=0, scale=64, unit="B")
    in_circular_buf_end: int = field("w21[0:25]", default=NO_CIRCULAR_BUFFER, doc="end + 1, in 64 B")
    coef_zero_point: int = field("w22[0:7]")
    out_zero_point: int = field("w22[8:15]")
    kernel_direct_stream: int = field("w22[16]", default=0, doc="coefficients from VIP SRAM directly")
    depthwise: int = field("w22[17]", default=0, doc="v8 only")
    unk_28: int = field("w28", default=0x03FFFFFF, doc="unknown; 0 in vendor self-tests")
    unk_29: int = field("w29", default=PLUS_INFINITY, doc="+infinity as float32: upper output clamp (inferred)")
    unk_30: int = field("w30", default=MINUS_INFINITY, doc="-infinity as float32: lower output clamp (inferred)")
