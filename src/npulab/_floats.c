/* Layers of networks in single precision, where they lie: no weight is copied, and a layer's own room is one panel.
 *
 * Optional: without a C compiler npulab installs without this module, and quantizing runs networks in ONNX Runtime.
 * Built against the stable ABI of Python 3.11; buffers come through the buffer protocol. The caller,
 * npulab/quantization/light.py, knows the shapes; here they are checked against the buffers' sizes again.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Constants lie in files at any address. */
typedef float loose __attribute__((aligned(1), may_alias));
typedef int8_t loose_int8_t;
typedef uint8_t loose_uint8_t;
typedef int16_t loose_int16_t __attribute__((aligned(1), may_alias));
typedef uint16_t loose_uint16_t __attribute__((aligned(1), may_alias));
typedef int32_t loose_int32_t __attribute__((aligned(1), may_alias));

#define LANES_MOST 64 /* floats that a loop may read behind what it needs */

struct loops {
    int columns;
    void (*rows)(Py_ssize_t, const loose *, Py_ssize_t, const float *, const float *, const loose *, float *, Py_ssize_t,
                 Py_ssize_t, float, float);
    float (*dot)(const loose *, const loose *, Py_ssize_t);
    void (*taps)(const float *, const Py_ssize_t *, const loose *, int, float, float *, Py_ssize_t, float, float);
    void (*extremes)(const loose *, Py_ssize_t, float[3]);
    void (*quantize8)(const loose *, uint8_t *, Py_ssize_t, float, int, float, float);
    void (*quantize16)(const loose *, uint16_t *, Py_ssize_t, float, int, float, float);
    void (*shown)(const loose *, float *, Py_ssize_t, float, float, float);
    void (*dequantize[5])(const void *, float *, Py_ssize_t, float, int32_t);
};

#define NAME(x) plain_##x
#define LANES 4
#define ROWS 6
#include "_floats_lanes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) avx2_##x
#define LANES 8
#define ROWS 6
#include "_floats_lanes.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define NAME(x) avx512_##x
#define LANES 16
#define ROWS 8
#include "_floats_lanes.h"
#pragma GCC pop_options

static const struct loops *best(void)
{
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw")
        && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma"))
        return &avx512_loops;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2_loops : &plain_loops;
}
#else
static const struct loops *best(void)
{
    return &plain_loops;
}
#endif

static const struct loops *loops = &plain_loops;

/* A convolution's numbers. Pads behind the data follow from the sizes of the output. */
struct shape {
    int n, c, iy, ix, f, ky, kx, oy, ox, sy, sx, dy, dx, py, px, groups;
};

static inline Py_ssize_t least(Py_ssize_t a, Py_ssize_t b)
{
    return a < b ? a : b;
}

/* A row; short ones without a call. */
static inline void copy_row(float *to, const loose *from, Py_ssize_t n)
{
    if (n > 64) {
        memcpy(to, from, (size_t)n * 4);
    } else if (n >= 4) {
        for (Py_ssize_t i = 0; i + 4 < n; i += 4)
            memcpy(to + i, from + i, 16);
        memcpy(to + n - 4, from + n - 4, 16);
    } else {
        if (n & 2)
            memcpy(to, from, 8);
        if (n & 1)
            memcpy(to + n - 1, from + n - 1, 4);
    }
}

/* Which outputs o of a row from `from` up to `behind` have o * step + shift within 0..size-1. */
static void inside(Py_ssize_t from, Py_ssize_t behind, Py_ssize_t step, Py_ssize_t shift, Py_ssize_t size,
                   Py_ssize_t *first, Py_ssize_t *end)
{
    Py_ssize_t a = shift < 0 ? (-shift + step - 1) / step : 0;
    Py_ssize_t b = size - shift > 0 ? (size - shift - 1) / step + 1 : 0;
    a = a < from ? from : a;
    b = b > behind ? behind : b;
    *first = a > behind ? behind : a;
    *end = b < *first ? *first : b;
}

/* What `columns` outputs from number `at` on read: panel[(channel, y, x)][output], zeros outside of the data. */
static void pack(const loose *in, const struct shape *s, int channels, Py_ssize_t at, Py_ssize_t columns, int width,
                 float *panel)
{
    const Py_ssize_t area = (Py_ssize_t)s->iy * s->ix;
    if (s->ky == 1 && s->kx == 1 && s->sy == 1 && s->sx == 1 && !s->py && !s->px && s->ox == s->ix && s->oy == s->iy) {
        for (int c = 0; c < channels; c++, panel += width) {
            memcpy(panel, in + c * area + at, (size_t)columns * 4);
            memset(panel + columns, 0, (size_t)(width - columns) * 4);
        }
        return;
    }
    for (int c = 0; c < channels; c++)
        for (int y = 0; y < s->ky; y++)
            for (int x = 0; x < s->kx; x++, panel += width) {
                Py_ssize_t done = 0, oy = at / s->ox, ox = at % s->ox;
                for (; done < columns; oy++, ox = 0) {
                    const Py_ssize_t end = least(s->ox, ox + columns - done), row = oy * s->sy + y * s->dy - s->py;
                    const Py_ssize_t shift = (Py_ssize_t)x * s->dx - s->px;
                    Py_ssize_t first, behind;
                    float *to = panel + done - ox;
                    inside(ox, end, s->sx, shift, row >= 0 && row < s->iy ? s->ix : 0, &first, &behind);
                    for (Py_ssize_t o = ox; o < first; o++)
                        to[o] = 0;
                    if (first < behind) {
                        const loose *from = in + c * area + row * s->ix + shift;
                        if (s->sx == 1)
                            memcpy(to + first, from + first, (size_t)(behind - first) * 4);
                        else
                            for (Py_ssize_t o = first; o < behind; o++)
                                to[o] = from[o * s->sx];
                    }
                    for (Py_ssize_t o = behind; o < end; o++)
                        to[o] = 0;
                    done += end - ox;
                }
                memset(panel + columns, 0, (size_t)(width - columns) * 4);
            }
}

static int convolve(const loose *in, const loose *w, const loose *bias, float *out, const struct shape *s, float low,
                    float high)
{
    const int width = loops->columns, channels = s->c / s->groups, filters = s->f / s->groups;
    const Py_ssize_t depth = (Py_ssize_t)channels * s->ky * s->kx, area = (Py_ssize_t)s->oy * s->ox;
    float *panel = malloc((size_t)(depth + 1) * (size_t)width * 4);
    if (!panel)
        return 0;
    float *first = panel + depth * width;
    memset(first, 0, (size_t)width * 4);
    for (Py_ssize_t g = 0; g < (Py_ssize_t)s->n * s->groups; g++) {
        const Py_ssize_t f = g % s->groups * filters;
        for (Py_ssize_t at = 0; at < area; at += width) {
            const Py_ssize_t columns = least(width, area - at);
            pack(in + g * channels * s->iy * s->ix, s, channels, at, columns, width, panel);
            loops->rows(filters, w + f * depth, depth, panel, first, bias ? bias + f : NULL,
                        out + g * filters * area + at, area, columns, low, high);
        }
    }
    free(panel);
    return 1;
}

/* A plane in a frame of zeros, cut into sy * sx parts of rows * pitch: pixel (y, x) of the frame in part
 * (y % sy, x % sx), there at (y / sy, x / sx). */
static inline __attribute__((always_inline)) void framed(const loose *in, const struct shape *s, const int sy,
                                                         const int sx, Py_ssize_t rows, Py_ssize_t pitch, float *frame)
{
    for (Py_ssize_t y = 0; y < s->iy && (y + s->py) / sy < rows; y++, in += s->ix)
        for (int phase = 0; phase < sx; phase++) {
            /* column x lies at x + px = place * sx + phase */
            const Py_ssize_t start = (phase - s->px % sx + sx) % sx, place = (start + s->px) / sx;
            const Py_ssize_t part = (y + s->py) % sy * sx + phase;
            float *to = frame + (part * rows + (y + s->py) / sy) * pitch + place;
            const Py_ssize_t count = start < s->ix && place < pitch
                ? least(pitch - place, (s->ix - start + sx - 1) / sx) : 0;
            if (sx == 1)
                copy_row(to, in, count);
            else if (sx == 2)
                for (Py_ssize_t i = 0; i < count; i++)
                    to[i] = in[start + 2 * i];
            else
                for (Py_ssize_t i = 0; i < count; i++)
                    to[i] = in[start + i * sx];
        }
}

/* One kernel a channel. In its frame the taps of neighbouring outputs are neighbours whatever the step, and all outputs
 * are one run; the ends of a part's rows give values that nobody reads. */
static int depthwise(const loose *in, const loose *w, const loose *bias, float *out, const struct shape *s, float low,
                     float high)
{
    const Py_ssize_t rows = (Py_ssize_t)s->oy + (Py_ssize_t)(s->ky - 1) * s->dy / s->sy;
    const Py_ssize_t pitch = (Py_ssize_t)s->ox + (Py_ssize_t)(s->kx - 1) * s->dx / s->sx;
    const Py_ssize_t area = rows * pitch, run = (s->oy - 1) * pitch + s->ox, taps = (Py_ssize_t)s->ky * s->kx;
    const Py_ssize_t lanes = loops->columns / 2, padded = (run + lanes - 1) / lanes * lanes;
    const Py_ssize_t plane = (Py_ssize_t)s->sy * s->sx * area + LANES_MOST;
    float *frame = calloc((size_t)(plane + padded), 4);
    Py_ssize_t *offset = malloc((size_t)taps * sizeof *offset);
    if (!frame || !offset) {
        free(frame);
        free(offset);
        return 0;
    }
    for (Py_ssize_t t = 0; t < taps; t++) {
        const Py_ssize_t y = t / s->kx * s->dy, x = t % s->kx * s->dx;
        offset[t] = (y % s->sy * s->sx + x % s->sx) * area + y / s->sy * pitch + x / s->sx;
    }
    const int each = s->f / s->c;
    const Py_ssize_t planes = (Py_ssize_t)s->n * s->c;
    for (Py_ssize_t g = 0; g < planes; g++, in += (Py_ssize_t)s->iy * s->ix) {
        if (s->sy == 1 && s->sx == 1) /* divisions by constants are quick */
            framed(in, s, 1, 1, rows, pitch, frame);
        else if (s->sy == 2 && s->sx == 2)
            framed(in, s, 2, 2, rows, pitch, frame);
        else
            framed(in, s, s->sy, s->sx, rows, pitch, frame);
        for (int m = 0; m < each; m++) {
            const Py_ssize_t f = g % s->c * each + m;
            float *to = out + (g * each + m) * s->oy * s->ox;
            loops->taps(frame, offset, w + f * taps, (int)taps, bias ? bias[f] : 0.0f, frame + plane, padded, low,
                        high);
            for (Py_ssize_t y = 0; y < s->oy; y++)
                copy_row(to + y * s->ox, frame + plane + y * pitch, s->ox);
        }
    }
    free(offset);
    free(frame);
    return 1;
}

/* out [m, n] = clamp(a [m, k] * b + bias [n]); element (i, j) of b lies at i * down + j * across. */
static int multiply(const loose *a, const loose *b, const loose *bias, float *out, Py_ssize_t m, Py_ssize_t k,
                    Py_ssize_t n, Py_ssize_t down, Py_ssize_t across, float low, float high)
{
    const int width = loops->columns;
    if (down == 1 && m < 4) {
        for (Py_ssize_t i = 0; i < m; i++)
            for (Py_ssize_t j = 0; j < n; j++) {
                float x = loops->dot(a + i * k, b + j * across, k) + (bias ? bias[j] : 0.0f);
                x = low > x ? low : x;
                out[i * n + j] = high < x ? high : x;
            }
        return 1;
    }
    float *panel = malloc((size_t)(k + 1) * (size_t)width * 4);
    if (!panel)
        return 0;
    float *first = panel + k * width;
    for (Py_ssize_t at = 0; at < n; at += width) {
        const Py_ssize_t columns = least(width, n - at);
        memset(panel, 0, (size_t)(k + 1) * (size_t)width * 4);
        if (across == 1)
            for (Py_ssize_t i = 0; i < k; i++)
                memcpy(panel + i * width, b + i * down + at, (size_t)columns * 4);
        else
            for (Py_ssize_t j = 0; j < columns; j++)
                for (Py_ssize_t i = 0; i < k; i++)
                    panel[i * width + j] = b[i * down + (at + j) * across];
        if (bias)
            memcpy(first, bias + at, (size_t)columns * 4);
        loops->rows(m, a, k, panel, first, NULL, out + at, n, columns, low, high);
    }
    free(panel);
    return 1;
}

/* Arguments that are buffers: released together, whatever happened. */
static PyObject *ended(Py_buffer *held, int count, int fits, int enough)
{
    for (int i = 0; i < count; i++)
        if (held[i].obj)
            PyBuffer_Release(&held[i]);
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "a buffer has not the size that the shapes say");
    else if (!enough)
        PyErr_NoMemory();
    else
        Py_RETURN_NONE;
    return NULL;
}

/* conv(x [n, c, iy, ix], w [f, c / groups, ky, kx], bias [f] or None, out [n, f, oy, ox],
 *      (n, c, iy, ix, f, ky, kx, oy, ox, sy, sx, dy, dx, py, px, groups), low, high): all float32. */
static PyObject *conv(PyObject *self, PyObject *args)
{
    Py_buffer held[4] = {{0}}; /* x, w, bias, out */
    struct shape s;
    float low, high;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*z*w*(iiiiiiiiiiiiiiii)ff", &held[0], &held[1], &held[2], &held[3], &s.n, &s.c, &s.iy,
                          &s.ix, &s.f, &s.ky, &s.kx, &s.oy, &s.ox, &s.sy, &s.sx, &s.dy, &s.dx, &s.py, &s.px, &s.groups,
                          &low, &high))
        return NULL;
    const int positive = s.n > 0 && s.c > 0 && s.iy > 0 && s.ix > 0 && s.f > 0 && s.ky > 0 && s.kx > 0 && s.oy > 0
        && s.ox > 0 && s.sy > 0 && s.sx > 0 && s.dy > 0 && s.dx > 0 && s.py >= 0 && s.px >= 0 && s.groups > 0;
    const double exact = 4503599627370496.0; /* sizes are compared in floating point: no product of them overflows */
    const int fits = positive && s.c % s.groups == 0 && s.f % s.groups == 0
        && (double)s.n * s.c * s.iy * s.ix * 4 == (double)held[0].len
        && (double)s.f * (s.c / s.groups) * s.ky * s.kx * 4 == (double)held[1].len
        && (!held[2].obj || (double)s.f * 4 == (double)held[2].len)
        && (double)s.n * s.f * s.oy * s.ox * 4 == (double)held[3].len
        && ((double)s.oy * s.sy + (double)s.ky * s.dy + s.py) * ((double)s.ox * s.sx + (double)s.kx * s.dx + s.px) < exact
        && ((double)s.ox * s.sx + (double)s.kx * s.dx + s.px) < 2147483647.0
        && ((double)s.oy * s.sy + (double)s.ky * s.dy + s.py) < 2147483647.0;
    int enough = 1;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        enough = (s.groups == s.c ? depthwise : convolve)(held[0].buf, held[1].buf, held[2].obj ? held[2].buf : NULL,
                                                          held[3].buf, &s, low, high);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 4, fits, enough);
}

/* matmul(a [m, k], b, bias [n] or None, out [m, n], m, k, n, turned, low, high): b is [k, n], turned [n, k]. */
static PyObject *matmul(PyObject *self, PyObject *args)
{
    Py_buffer held[4] = {{0}};
    Py_ssize_t m, k, n;
    int turned, enough = 1;
    float low, high;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*z*w*nnnpff", &held[0], &held[1], &held[2], &held[3], &m, &k, &n, &turned, &low,
                          &high))
        return NULL;
    const int fits = m > 0 && k > 0 && n > 0 && (double)m * (double)k * 4 == (double)held[0].len
        && (double)k * (double)n * 4 == (double)held[1].len && (!held[2].obj || (double)n * 4 == (double)held[2].len)
        && (double)m * (double)n * 4 == (double)held[3].len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        enough = multiply(held[0].buf, held[1].buf, held[2].obj ? held[2].buf : NULL, held[3].buf, m, k, n,
                          turned ? 1 : n, turned ? k : 1, low, high);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 4, fits, enough);
}

/* extremes(x) -> (least, largest, sum) of float32; NaN is only in the sum. */
static PyObject *extremes(PyObject *self, PyObject *args)
{
    Py_buffer held[1] = {{0}};
    float found[3] = {0};
    (void)self;
    if (!PyArg_ParseTuple(args, "y*", &held[0]))
        return NULL;
    const int fits = held[0].len >= 4 && held[0].len % 4 == 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        loops->extremes(held[0].buf, held[0].len / 4, found);
        Py_END_ALLOW_THREADS
    }
    PyObject *done = ended(held, 1, fits, 1);
    if (!done)
        return NULL;
    Py_DECREF(done);
    return Py_BuildValue("ddd", (double)found[0], (double)found[1], (double)found[2]);
}

/* quantize(x, out, bytes, scale, zero, low, high): codes low..high of 1 or 2 bytes, one scale. */
static PyObject *quantize(PyObject *self, PyObject *args)
{
    Py_buffer held[2] = {{0}};
    int bytes, zero, low, high;
    float scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*ifiii", &held[0], &held[1], &bytes, &scale, &zero, &low, &high))
        return NULL;
    const Py_ssize_t n = held[0].len / 4;
    const int fits = held[0].len % 4 == 0 && (bytes == 1 || bytes == 2) && held[1].len == n * bytes
        && low <= zero && zero <= high && low >= -32768 && high <= 65535;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        if (bytes == 1)
            loops->quantize8(held[0].buf, held[1].buf, n, scale, zero, (float)(low - zero), (float)(high - zero));
        else
            loops->quantize16(held[0].buf, held[1].buf, n, scale, zero, (float)(low - zero), (float)(high - zero));
        Py_END_ALLOW_THREADS
    }
    return ended(held, 2, fits, 1);
}

/* shown(x, out, scale, low, high): scale times the whole number of steps, low..high, next to x; out may be x. */
static PyObject *shown(PyObject *self, PyObject *args)
{
    Py_buffer held[2] = {{0}};
    int low, high;
    float scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*fii", &held[0], &held[1], &scale, &low, &high))
        return NULL;
    const int fits = held[0].len % 4 == 0 && held[1].len == held[0].len && low <= 0 && high >= 0 && low >= -65535
        && high <= 65535;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        loops->shown(held[0].buf, held[1].buf, held[0].len / 4, scale, (float)low, (float)high);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 2, fits, 1);
}

/* dequantize(codes, out, kind, scale, zero): kind 0 int8, 1 uint8, 2 int16, 3 uint16, 4 int32. */
static PyObject *dequantize(PyObject *self, PyObject *args)
{
    Py_buffer held[2] = {{0}};
    int kind, zero;
    float scale;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*ifi", &held[0], &held[1], &kind, &scale, &zero))
        return NULL;
    const Py_ssize_t n = held[1].len / 4;
    const int fits = kind >= 0 && kind < 5 && held[1].len % 4 == 0 && held[0].len == n * (1 << kind / 2);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        loops->dequantize[kind](held[0].buf, held[1].buf, n, scale, zero);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 2, fits, 1);
}

/* level(n) -> the width of vectors that is used from now on: at most n floats, and what the processor has. For tests. */
static PyObject *level(PyObject *self, PyObject *args)
{
    int most;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &most))
        return NULL;
    loops = best();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (loops->columns > 2 * most)
        loops = most >= 8 ? &avx2_loops : &plain_loops;
#endif
    return PyLong_FromLong(loops->columns / 2);
}

static PyMethodDef methods[] = {
    {"conv", conv, METH_VARARGS, "A convolution, bias and clamp."},
    {"matmul", matmul, METH_VARARGS, "A product of matrices, bias and clamp."},
    {"extremes", extremes, METH_VARARGS, "The least, the largest, the sum."},
    {"quantize", quantize, METH_VARARGS, "Floats to integers."},
    {"shown", shown, METH_VARARGS, "Floats as integers show them."},
    {"dequantize", dequantize, METH_VARARGS, "Integers to floats."},
    {"level", level, METH_VARARGS, "The width of vectors."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_floats", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__floats(void)
{
    loops = best();
    return PyModuleDef_Init(&module);
}
