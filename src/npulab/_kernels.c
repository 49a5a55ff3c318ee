/* The two inner loops of the virtual NPU that NumPy would walk over memory several times.
 *
 * Optional: without a C compiler npulab installs without this module, and NumPy gives the same bytes more slowly.
 * Built against the stable ABI of Python 3.11; buffers come through the buffer protocol, so NumPy's headers are not
 * needed. The callers in npulab/targets/vivante/machine check shapes; here only sizes in bytes are checked again.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* floor(acc * scale + 1/2) + zero_point, clamped. acc * scale is exact in double: acc has at most 32 bits, and scale
 * is a 16-bit integer times a power of two. */
static inline uint8_t narrow(int32_t acc, double scale, int zero_point, int low)
{
    double q = floor((double)acc * scale + 0.5) + zero_point;
    q = q < low ? low : q;
    q = q > 255 ? 255 : q;
    return (uint8_t)(int32_t)q;
}

CLONES static void requantize_row(const float *restrict acc, int32_t bias, uint8_t *restrict out, Py_ssize_t n,
                                  double scale, int zero_point, int low)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = narrow((int32_t)((uint32_t)(int32_t)acc[i] + (uint32_t)bias), scale, zero_point, low);
}

/* One plane of bytes as floats, cut into step * step parts: pixel (y, x) goes to part (y % step, x % step), there to
 * (y / step, x / step). Within a part the taps of neighbouring outputs are neighbours, whatever the step; `pitch` is
 * the length of a part's rows, `area` that of a part. */
CLONES static void spread_plane(const uint8_t *restrict in, float *restrict out, int rows, int columns, int step,
                                Py_ssize_t pitch, Py_ssize_t area)
{
    if (step == 1) {
        for (Py_ssize_t i = 0; i < area; i++)
            out[i] = in[i];
        return;
    }
    for (int y = 0; y < rows; y++, in += columns)
        for (int phase = 0; phase < step; phase++) {
            float *restrict to = out + (y % step * step + phase) * area + y / step * pitch;
            for (int x = phase; x < columns; x += step)
                *to++ = in[x];
        }
}

/* One channel, all its outputs in one run of n: the ends of a part's rows give values that nobody reads, which costs
 * less than starting anew for each row. Sums are exact in float: at most 225 products below 2**16 each. */
CLONES static void depthwise_plane(const float *restrict in, Py_ssize_t pitch, Py_ssize_t area,
                                   const int16_t *restrict weights, int ky, int kx, int step, int32_t bias,
                                   float *restrict acc, uint8_t *restrict out, Py_ssize_t n, double scale,
                                   int zero_point, int low)
{
    for (Py_ssize_t i = 0; i < n; i++)
        acc[i] = 0;
    for (int y = 0; y < ky; y++) {
        const float *restrict row = in + y % step * step * area + y / step * pitch;
        const int16_t *restrict w = weights + y * kx;
        int x = 0;
        for (; x + 2 < kx; x += 3) { /* three taps at a time: most kernels are 3x3 */
            const float *restrict a = row + x % step * area + x / step;
            const float *restrict b = row + (x + 1) % step * area + (x + 1) / step;
            const float *restrict c = row + (x + 2) % step * area + (x + 2) / step;
            const float wa = w[x], wb = w[x + 1], wc = w[x + 2];
            for (Py_ssize_t i = 0; i < n; i++)
                acc[i] += wa * a[i] + wb * b[i] + wc * c[i];
        }
        for (; x < kx; x++) {
            const float *restrict a = row + x % step * area + x / step;
            const float wa = w[x];
            for (Py_ssize_t i = 0; i < n; i++)
                acc[i] += wa * a[i];
        }
    }
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = narrow((int32_t)((uint32_t)(int32_t)acc[i] + (uint32_t)bias), scale, zero_point, low);
}

static PyObject *too_small(void)
{
    PyErr_SetString(PyExc_ValueError, "a buffer is smaller than the shapes say");
    return NULL;
}

/* requantize(acc f32 [rows, n], bias i32 [rows], out u8 [rows, n], scale, zero_point, low) */
static PyObject *requantize(PyObject *self, PyObject *args)
{
    Py_buffer acc, bias, out;
    double scale;
    int zero_point, low;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*dii", &acc, &bias, &out, &scale, &zero_point, &low))
        return NULL;
    const Py_ssize_t rows = bias.len / 4, n = rows ? out.len / rows : 0;
    const int fits = rows * n == out.len && acc.len == 4 * out.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t r = 0; r < rows; r++)
            requantize_row((const float *)acc.buf + r * n, ((const int32_t *)bias.buf)[r], (uint8_t *)out.buf + r * n,
                           n, scale, zero_point, low);
        Py_END_ALLOW_THREADS
    }
    PyBuffer_Release(&acc);
    PyBuffer_Release(&bias);
    PyBuffer_Release(&out);
    if (!fits)
        return too_small();
    Py_RETURN_NONE;
}

/* depthwise(in u8 [c, in_y, in_x], weights i16 [c, ky, kx], bias i32 [c], out u8 [c, out_y, out_x],
 *           in_y, in_x, ky, kx, out_y, out_x, step, scale, zero_point, low) */
static PyObject *depthwise(PyObject *self, PyObject *args)
{
    Py_buffer in, weights, bias, out;
    int in_y, in_x, ky, kx, out_y, out_x, step, zero_point, low;
    double scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*w*iiiiiiidii", &in, &weights, &bias, &out, &in_y, &in_x, &ky, &kx, &out_y, &out_x,
                          &step, &scale, &zero_point, &low))
        return NULL;
    const Py_ssize_t c = bias.len / 4, in_plane = (Py_ssize_t)in_y * in_x, out_plane = (Py_ssize_t)out_y * out_x;
    const int positive = in_y > 0 && in_x > 0 && ky > 0 && kx > 0 && ky * kx <= 225 && out_y > 0 && out_x > 0
        && (step == 1 || step == 2);
    const int fits = positive && in.len == c * in_plane && weights.len == 2 * c * ky * kx && out.len == c * out_plane
        && (Py_ssize_t)(out_y - 1) * step + ky <= in_y && (Py_ssize_t)(out_x - 1) * step + kx <= in_x;
    const Py_ssize_t pitch = fits ? (in_x + step - 1) / step : 0, area = fits ? (in_y + step - 1) / step * pitch : 0;
    const Py_ssize_t n = (out_y - 1) * pitch + out_x;
    float *plane = fits ? calloc((size_t)(step * step * area + n), sizeof(float)) : NULL;
    uint8_t *bytes = plane ? malloc((size_t)n) : NULL;
    if (bytes) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t ch = 0; ch < c; ch++) {
            uint8_t *to = (uint8_t *)out.buf + ch * out_plane;
            spread_plane((const uint8_t *)in.buf + ch * in_plane, plane, in_y, in_x, step, pitch, area);
            depthwise_plane(plane, pitch, area, (const int16_t *)weights.buf + ch * ky * kx, ky, kx, step,
                            ((const int32_t *)bias.buf)[ch], plane + step * step * area, bytes, n, scale, zero_point,
                            low);
            for (int y = 0; y < out_y; y++)
                memcpy(to + (Py_ssize_t)y * out_x, bytes + y * pitch, (size_t)out_x);
        }
        Py_END_ALLOW_THREADS
    }
    const int enough = bytes != NULL;
    free(bytes);
    free(plane);
    PyBuffer_Release(&in);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&bias);
    PyBuffer_Release(&out);
    if (!fits)
        return too_small();
    if (!enough)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"requantize", requantize, METH_VARARGS, "Accumulators and biases to bytes."},
    {"depthwise", depthwise, METH_VARARGS, "One kernel a channel, then to bytes."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernels", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernels(void)
{
    return PyModuleDef_Init(&module);
}
