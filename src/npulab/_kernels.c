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

/* One channel: every tap of the kernel over a padded plane of bytes, then narrowed. */
CLONES static void depthwise_row(const uint8_t *restrict in, Py_ssize_t pitch, const int16_t *restrict weights, int ky,
                                 int kx, int step, int32_t bias, int32_t *restrict acc, uint8_t *restrict out,
                                 Py_ssize_t n, double scale, int zero_point, int low)
{
    for (Py_ssize_t i = 0; i < n; i++)
        acc[i] = bias;
    for (int y = 0; y < ky; y++)
        for (int x = 0; x < kx; x++) {
            const uint32_t w = (uint32_t)(int32_t)weights[y * kx + x];
            const uint8_t *restrict p = in + y * pitch + x;
            if (!w)
                continue;
            if (step == 1)
                for (Py_ssize_t i = 0; i < n; i++)
                    acc[i] = (int32_t)((uint32_t)acc[i] + w * p[i]);
            else
                for (Py_ssize_t i = 0; i < n; i++)
                    acc[i] = (int32_t)((uint32_t)acc[i] + w * p[i * step]);
        }
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = narrow(acc[i], scale, zero_point, low);
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
    const int positive = in_y > 0 && in_x > 0 && ky > 0 && kx > 0 && out_y > 0 && out_x > 0 && step > 0;
    const int fits = positive && in.len == c * in_plane && weights.len == 2 * c * ky * kx && out.len == c * out_plane
        && (Py_ssize_t)(out_y - 1) * step + ky <= in_y && (Py_ssize_t)(out_x - 1) * step + kx <= in_x;
    int32_t *acc = fits ? malloc(4 * (size_t)out_x) : NULL;
    if (acc) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t ch = 0; ch < c; ch++)
            for (int y = 0; y < out_y; y++)
                depthwise_row((const uint8_t *)in.buf + ch * in_plane + (Py_ssize_t)y * step * in_x, in_x,
                              (const int16_t *)weights.buf + ch * ky * kx, ky, kx, step, ((const int32_t *)bias.buf)[ch],
                              acc, (uint8_t *)out.buf + ch * out_plane + (Py_ssize_t)y * out_x, out_x, scale, zero_point,
                              low);
        Py_END_ALLOW_THREADS
    }
    free(acc);
    PyBuffer_Release(&in);
    PyBuffer_Release(&weights);
    PyBuffer_Release(&bias);
    PyBuffer_Release(&out);
    if (!fits)
        return too_small();
    if (!acc)
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
