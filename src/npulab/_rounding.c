/* Loops of rounding one layer's weights (npulab/quantization/rounding_brief.py): a Cholesky factor where its matrix
 * lies, and what is done with it to rows of weights, so many of them side by side.
 *
 * Optional: without a C compiler npulab installs without this module, and NumPy does the same with more memory.
 * Built against the stable ABI of Python 3.11; buffers come through the buffer protocol, their sizes are checked here.
 *
 * Matrices are (groups, k, k), of which only the lower triangle is read; rows are (groups, r, k); single precision.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 64 /* rows side by side */
#define CHAINS 32 /* of a sum of products: what it comes to does not depend on the width of vectors */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define BY_PROCESSOR __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define BY_PROCESSOR
#endif

/* rows [n][k] to lanes [k][LANES]; the lanes behind are 0. */
static void gather(const float *rows, Py_ssize_t n, Py_ssize_t k, float *lanes)
{
    memset(lanes, 0, (size_t)k * LANES * sizeof *lanes);
    for (Py_ssize_t r = 0; r < n; r++)
        for (Py_ssize_t i = 0; i < k; i++)
            lanes[i * LANES + r] = rows[r * k + i];
}

/* The lower triangle L of h = L L^T in its place. Returns whether h is positive definite. */
BY_PROCESSOR
static int factored(float *h, Py_ssize_t k)
{
    for (Py_ssize_t i = 0; i < k; i++) {
        float *own = h + i * k;
        for (Py_ssize_t j = 0; j <= i; j++) {
            const float *other = h + j * k;
            float chains[CHAINS] = {0}, sum = 0;
            Py_ssize_t m = 0;
            for (; m + CHAINS <= j; m += CHAINS)
                for (int c = 0; c < CHAINS; c++)
                    chains[c] += own[m + c] * other[m + c];
            for (; m < j; m++)
                sum += own[m] * other[m];
            for (int c = 0; c < CHAINS; c++)
                sum += chains[c];
            sum = own[j] - sum;
            if (j < i)
                own[j] = sum / other[j];
            else if (!(sum > 0))
                return 0;
            else
                own[j] = sqrtf(sum);
        }
    }
    return 1;
}

/* to[0..LANES-1] += factor * from. */
#define ADD(to, factor, from)                \
    for (int add_ = 0; add_ < LANES; add_++) \
        (to)[add_] += (factor) * (from)[add_]

/* L L^T y = x for all lanes, y in the place of x [k][LANES]. */
BY_PROCESSOR
static void solved(const float *l, Py_ssize_t k, float *x)
{
    for (Py_ssize_t i = 0; i < k; i++) {
        float own[LANES];
        memcpy(own, x + i * LANES, sizeof own);
        for (Py_ssize_t j = 0; j < i; j++)
            ADD(own, -l[i * k + j], x + j * LANES);
        for (int c = 0; c < LANES; c++)
            x[i * LANES + c] = own[c] / l[i * k + i];
    }
    for (Py_ssize_t i = k - 1; i >= 0; i--) {
        float own[LANES];
        for (int c = 0; c < LANES; c++)
            own[c] = x[i * LANES + c] /= l[i * k + i];
        for (Py_ssize_t j = 0; j < i; j++)
            ADD(x + j * LANES, -l[i * k + j], own);
    }
}

/* |x L|^2 of each lane; `room` [k][LANES]. */
BY_PROCESSOR
static void measured(const float *l, Py_ssize_t k, const float *x, float *room, double *found)
{
    memset(room, 0, (size_t)k * LANES * sizeof *room);
    for (Py_ssize_t j = 0; j < k; j++) {
        float own[LANES];
        memcpy(own, x + j * LANES, sizeof own);
        for (Py_ssize_t i = 0; i <= j; i++)
            ADD(room + i * LANES, l[j * k + i], own);
    }
    for (int c = 0; c < LANES; c++)
        found[c] = 0;
    for (Py_ssize_t i = 0; i < k; i++)
        for (int c = 0; c < LANES; c++)
            found[c] += (double)room[i * LANES + c] * room[i * LANES + c];
}

/* Integers (in the place of the targets, x [k][LANES]) that are scale * (n - zero) near them: the last weight first,
 * each making up for those before it. `found`: |(scale * (n - zero) - x) L|^2 of each lane. */
BY_PROCESSOR
static void rounded(const float *l, Py_ssize_t k, float *x, float *room, const float *scale, const float *zero,
                    float low, float high, double *found)
{
    memset(room, 0, (size_t)k * LANES * sizeof *room);
    for (int c = 0; c < LANES; c++)
        found[c] = 0;
    for (Py_ssize_t j = k - 1; j >= 0; j--) {
        const float pivot = l[j * k + j], *known = room + j * LANES;
        float off[LANES], *own = x + j * LANES;
        for (int c = 0; c < LANES; c++) {
            float n = rintf((own[c] - known[c] / pivot) / scale[c]) + zero[c];
            n = n > low ? n : low; /* NaN becomes the lowest */
            n = n < high ? n : high;
            off[c] = (n - zero[c]) * scale[c] - own[c];
            const float left = known[c] + pivot * off[c];
            found[c] += (double)left * left;
            own[c] = n;
        }
        for (Py_ssize_t i = 0; i < j; i++)
            ADD(room + i * LANES, l[j * k + i], off);
    }
}

static int are(const Py_buffer *held, double numbers, int bytes)
{
    return (double)held->len == numbers * bytes;
}

static PyObject *ended(Py_buffer *held, int count, int fits, int enough)
{
    for (int i = 0; i < count; i++)
        if (held[i].obj)
            PyBuffer_Release(&held[i]);
    if (!fits) {
        PyErr_SetString(PyExc_ValueError, "sizes do not belong together");
        return NULL;
    }
    if (!enough)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* factor(h, groups, k) -> whether all matrices are positive definite. Their lower triangles are factors then. */
static PyObject *factor(PyObject *self, PyObject *args)
{
    Py_buffer h = {0};
    Py_ssize_t groups, k;
    int fine = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "w*nn", &h, &groups, &k))
        return NULL;
    const int fits = groups > 0 && k > 0 && are(&h, (double)groups * k * k, 4);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t g = 0; g < groups && fine; g++)
            fine = factored((float *)h.buf + g * k * k, k);
        Py_END_ALLOW_THREADS
    }
    PyObject *none = ended(&h, 1, fits, 1);
    Py_XDECREF(none);
    return none ? PyBool_FromLong(fine) : NULL;
}

/* solve(l, rows, groups, r, k): rows (L L^T)^-1 in their place. */
static PyObject *solve(PyObject *self, PyObject *args)
{
    Py_buffer held[2] = {{0}};
    Py_ssize_t groups, r, k;
    int enough = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*w*nnn", &held[0], &held[1], &groups, &r, &k))
        return NULL;
    const int fits = groups > 0 && r > 0 && k > 0 && are(&held[0], (double)groups * k * k, 4)
        && are(&held[1], (double)groups * r * k, 4);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        float *lanes = malloc((size_t)k * LANES * sizeof *lanes);
        enough = lanes != NULL;
        for (Py_ssize_t at = 0; enough && at < groups * r; ) {
            const Py_ssize_t g = at / r, left = r - at % r, n = left < LANES ? left : LANES;
            float *rows = (float *)held[1].buf + at * k;
            gather(rows, n, k, lanes);
            solved((const float *)held[0].buf + g * k * k, k, lanes);
            for (Py_ssize_t c = 0; c < n; c++)
                for (Py_ssize_t i = 0; i < k; i++)
                    rows[c * k + i] = lanes[i * LANES + c];
            at += n;
        }
        free(lanes);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 2, fits, enough);
}

/* lengths(l, rows, out, groups, r, k): |row L|^2, in double precision. */
static PyObject *lengths(PyObject *self, PyObject *args)
{
    Py_buffer held[3] = {{0}};
    Py_ssize_t groups, r, k;
    int enough = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*nnn", &held[0], &held[1], &held[2], &groups, &r, &k))
        return NULL;
    const int fits = groups > 0 && r > 0 && k > 0 && are(&held[0], (double)groups * k * k, 4)
        && are(&held[1], (double)groups * r * k, 4) && are(&held[2], (double)groups * r, 8);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        float *lanes = malloc((size_t)k * LANES * 2 * sizeof *lanes);
        enough = lanes != NULL;
        for (Py_ssize_t at = 0; enough && at < groups * r; ) {
            const Py_ssize_t g = at / r, left = r - at % r, n = left < LANES ? left : LANES;
            double found[LANES];
            gather((const float *)held[1].buf + at * k, n, k, lanes);
            measured((const float *)held[0].buf + g * k * k, k, lanes, lanes + k * LANES, found);
            memcpy((double *)held[2].buf + at, found, (size_t)n * sizeof *found);
            at += n;
        }
        free(lanes);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 3, fits, enough);
}

/* sequential(l, targets, scales, zeros, codes, costs, groups, r, k, low, high, bytes): integers of `bytes` bytes, and
 * what rounding costs each row. Scales and zeros are floats, one a row. */
static PyObject *sequential(PyObject *self, PyObject *args)
{
    Py_buffer held[6] = {{0}};
    Py_ssize_t groups, r, k;
    int low, high, bytes, enough = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*y*y*w*w*nnniii", &held[0], &held[1], &held[2], &held[3], &held[4], &held[5],
                          &groups, &r, &k, &low, &high, &bytes))
        return NULL;
    const double rows = (double)groups * r;
    const int fits = groups > 0 && r > 0 && k > 0 && (bytes == 1 || bytes == 2) && low <= high && low >= -32768
        && high <= 65535 && are(&held[0], (double)groups * k * k, 4) && are(&held[1], rows * k, 4)
        && are(&held[2], rows, 4) && are(&held[3], rows, 4) && are(&held[4], rows * k, bytes) && are(&held[5], rows, 8);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        float *lanes = malloc((size_t)k * LANES * 2 * sizeof *lanes);
        enough = lanes != NULL;
        for (Py_ssize_t at = 0; enough && at < groups * r; ) {
            const Py_ssize_t g = at / r, left = r - at % r, n = left < LANES ? left : LANES;
            float scale[LANES], zero[LANES];
            double found[LANES];
            for (int c = 0; c < LANES; c++) {
                scale[c] = c < n ? ((const float *)held[2].buf)[at + c] : 1;
                zero[c] = c < n ? ((const float *)held[3].buf)[at + c] : 0;
            }
            gather((const float *)held[1].buf + at * k, n, k, lanes);
            rounded((const float *)held[0].buf + g * k * k, k, lanes, lanes + k * LANES, scale, zero, (float)low,
                    (float)high, found);
            for (Py_ssize_t c = 0; c < n; c++)
                for (Py_ssize_t i = 0; i < k; i++) {
                    const int32_t code = (int32_t)lanes[i * LANES + c];
                    if (bytes == 1)
                        ((uint8_t *)held[4].buf)[(at + c) * k + i] = (uint8_t)code;
                    else
                        ((uint16_t *)held[4].buf)[(at + c) * k + i] = (uint16_t)code;
                }
            memcpy((double *)held[5].buf + at, found, (size_t)n * sizeof *found);
            at += n;
        }
        free(lanes);
        Py_END_ALLOW_THREADS
    }
    return ended(held, 6, fits, enough);
}

static PyMethodDef methods[] = {
    {"factor", factor, METH_VARARGS, "Cholesky factors."},
    {"solve", solve, METH_VARARGS, "Rows times the inverse."},
    {"lengths", lengths, METH_VARARGS, "Squared lengths of rows."},
    {"sequential", sequential, METH_VARARGS, "Weights rounded one after another."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rounding", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__rounding(void)
{
    return PyModuleDef_Init(&module);
}
