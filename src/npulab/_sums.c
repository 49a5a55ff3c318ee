/* Exact integer sums of products: 8-bit operands less their zero points, 32-bit sums that wrap.
 *
 * Optional, as _kernels.c is, and against the same stable ABI: npulab.reference.accumulate goes other ways without it,
 * to the same bytes. Differences have 9 bits and are kept in 16, so that two products and their sum are one instruction
 * of x86. What is multiplied is never copied as a whole: a panel of some columns, and of some terms, is written out at a
 * time, then every row goes over it.
 */
#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

enum { TERMS = 512, COLUMNS = 256, ROWS = 6, PITCH = COLUMNS + 16, FEW = 12, PLANE_TAPS = 256, PLANE = 1 << 22 };
/* A panel's terms, two by two, and columns; rows that go over it together; what one pair of terms is apart from the
 * next: no power of two, or all would meet in the same few lines of the cache. Rows below which no panel is written;
 * taps of a kernel whose sums floats hold exactly; floats of a plane that is written out as a whole. */

typedef struct { int flip, zero; } Operand; /* code ^ flip - zero: signed codes become unsigned, 128 more */

CLONES static void widen(const uint8_t *restrict in, Operand of, int16_t *restrict out, Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = (int16_t)((in[i] ^ of.flip) - of.zero);
}

CLONES static void interleave(const int16_t *restrict one, const int16_t *restrict other, int16_t *restrict out,
                              Py_ssize_t n)
{
    for (Py_ssize_t i = 0; i < n; i++) {
        out[2 * i] = one[i];
        out[2 * i + 1] = other[i];
    }
}

/* A row that is wide already times a row of codes. */
CLONES static int32_t dot(const int16_t *restrict one, const uint8_t *restrict other, int flip, Py_ssize_t n)
{
    int32_t sum = 0;
    for (Py_ssize_t i = 0; i < n; i++)
        sum += one[i] * (int16_t)(other[i] ^ flip);
    return sum;
}

/* ROWS rows of pairs (TERMS / 2 apart) times `columns` columns of the panel, added up into sums[ROWS][COLUMNS]. */
typedef void Tile(const int32_t *rows, const int32_t *panel, int pairs, int columns, int32_t *sums);

#define TILE(NAME, TARGET, LANES, VECTOR, MULTIPLY_ADD) \
    typedef int32_t VECTOR __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); \
    TARGET static void NAME(const int32_t *rows, const int32_t *panel, int pairs, int columns, int32_t *sums) \
    { \
        for (int c = 0; c < columns; c += 2 * LANES) { \
            VECTOR a[ROWS] = {0}, b[ROWS] = {0}; \
            for (int k = 0; k < pairs; k++) { \
                const VECTOR *at = (const VECTOR *)(panel + k * PITCH + c); \
                const VECTOR v = at[0], w = at[1]; \
                for (int r = 0; r < ROWS; r++) { \
                    const VECTOR x = (VECTOR){0} + rows[r * (TERMS / 2) + k]; \
                    a[r] = MULTIPLY_ADD(VECTOR, a[r], x, v); \
                    b[r] = MULTIPLY_ADD(VECTOR, b[r], x, w); \
                } \
            } \
            for (int r = 0; r < ROWS; r++) { \
                VECTOR *to = (VECTOR *)(sums + r * COLUMNS + c); \
                to[0] += a[r]; \
                to[1] += b[r]; \
            } \
        } \
    }

#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE(V, sum, x, y) ((V)_mm512_dpwssd_epi32((__m512i)(sum), (__m512i)(x), (__m512i)(y)))
#define HALF(V, sum, x, y) ((sum) + (V)_mm256_madd_epi16((__m256i)(x), (__m256i)(y)))
#define BASE(V, sum, x, y) ((sum) + (V)_mm_madd_epi16((__m128i)(x), (__m128i)(y)))
TILE(tile_avx512, __attribute__((target("avx512vnni,avx512bw"))), 16, Vector16, WIDE)
TILE(tile_avx2, __attribute__((target("avx2"))), 8, Vector8, HALF)
#else
#define BASE(V, sum, x, y) ((sum) + ((x) << 16 >> 16) * ((y) << 16 >> 16) + ((x) >> 16) * ((y) >> 16))
#endif
TILE(tile_base, , 4, Vector4, BASE)

static Tile *tiles[3]; /* those that this processor has, best first */
static int tile_count;

static void find_tiles(void)
{
    tile_count = 0;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
        tiles[tile_count++] = tile_avx512;
    if (__builtin_cpu_supports("avx2"))
        tiles[tile_count++] = tile_avx2;
#endif
    tiles[tile_count++] = tile_base;
}

/* What is unfolded into columns: an image [c, h, w] of bytes under a window, positions in rows of `across`. */
typedef struct {
    const uint8_t *data;
    Operand of;
    Py_ssize_t h, w, kh, kw, step_y, step_x, apart_y, apart_x, top, left, across;
    Py_ssize_t channels; /* of the window: terms go channels, rows, columns; or `last` rows, columns, channels */
    int last;
} Image;

/* Term `term` of `count` positions from the first: the codes there less the zero point, and 0 outside the image. */
static void read_term(const Image *im, Py_ssize_t term, Py_ssize_t first, Py_ssize_t count, int16_t *to)
{
    const Py_ssize_t area = im->kh * im->kw, c = im->last ? term % im->channels : term / area;
    const Py_ssize_t tap = im->last ? term / im->channels : term % area;
    const Py_ssize_t up = tap / im->kw * im->apart_y - im->top, aside = tap % im->kw * im->apart_x - im->left;
    const Py_ssize_t least = aside < 0 ? (-aside + im->step_x - 1) / im->step_x : 0;
    const Py_ssize_t end = aside < im->w ? (im->w - 1 - aside) / im->step_x + 1 : 0;
    memset(to, 0, (size_t)count * sizeof *to);
    for (Py_ssize_t y = first / im->across, x = first % im->across; count > 0; y++, x = 0) {
        const Py_ssize_t run = im->across - x < count ? im->across - x : count, row = y * im->step_y + up;
        const Py_ssize_t a = least > x ? least : x, b = end < x + run ? end : x + run;
        if (row >= 0 && row < im->h && a < b) {
            const uint8_t *from = im->data + (c * im->h + row) * im->w + a * im->step_x + aside;
            if (im->step_x == 1)
                widen(from, im->of, to + a - x, b - a);
            else
                for (Py_ssize_t i = 0; i < b - a; i++)
                    to[a - x + i] = (int16_t)((from[i * im->step_x] ^ im->of.flip) - im->of.zero);
        }
        to += run;
        count -= run;
    }
}

/* Columns first.. of the panel, terms begin..end of them: out of an image, or, where there is none, of rows of bytes. */
static void write_panel(const Image *im, const uint8_t *rows, Operand of, Py_ssize_t pitch, Py_ssize_t first,
                        Py_ssize_t count, Py_ssize_t begin, Py_ssize_t end, int32_t *panel)
{
    int16_t one[TERMS + COLUMNS] = {0}, other[COLUMNS] = {0};
    if (im) {
        for (Py_ssize_t k = begin; k < end; k += 2, panel += PITCH) {
            read_term(im, k, first, count, one);
            if (k + 1 < end)
                read_term(im, k + 1, first, count, other);
            else
                memset(other, 0, sizeof other);
            interleave(one, other, (int16_t *)panel, count);
        }
        return;
    }
    for (Py_ssize_t c = 0; c < count; c++) {
        widen(rows + (first + c) * pitch + begin, of, one, end - begin);
        one[end - begin] = 0;
        for (Py_ssize_t k = 0; k < end - begin; k += 2)
            memcpy(panel + k / 2 * PITCH + c, one + k, 4);
    }
}

typedef struct { int32_t panel[TERMS / 2 * PITCH], rows[ROWS * TERMS / 2], sums[ROWS * COLUMNS]; } Room;

/* sums[r, c] over terms of left[r, k] times column c; `pitch` bytes are between the columns' rows if there is no
 * image. */
static void add_up(Tile *tile, Room *room, const uint8_t *left, Operand of, Py_ssize_t rows, const Image *im,
                   const uint8_t *right, Operand of_right, Py_ssize_t columns, Py_ssize_t terms, int32_t *sums)
{
    for (Py_ssize_t first = 0; first < columns; first += COLUMNS) {
        const Py_ssize_t count = columns - first < COLUMNS ? columns - first : COLUMNS;
        for (Py_ssize_t begin = 0; begin < terms; begin += TERMS) {
            const Py_ssize_t n = terms - begin < TERMS ? terms - begin : TERMS;
            write_panel(im, right, of_right, terms, first, count, begin, begin + n, room->panel);
            for (Py_ssize_t r = 0; r < rows; r += ROWS) {
                const Py_ssize_t some = rows - r < ROWS ? rows - r : ROWS;
                for (Py_ssize_t i = 0; i < some; i++) {
                    int16_t *to = (int16_t *)(room->rows + i * (TERMS / 2));
                    widen(left + (r + i) * terms + begin, of, to, n);
                    if (n % 2)
                        to[n] = 0;
                    int32_t *sum = room->sums + i * COLUMNS;
                    if (begin)
                        memcpy(sum, sums + (r + i) * columns + first, (size_t)count * 4);
                    else
                        memset(sum, 0, (size_t)count * 4);
                }
                tile(room->rows, room->panel, (int)(n + 1) / 2, (int)count, room->sums);
                for (Py_ssize_t i = 0; i < some; i++)
                    memcpy(sums + (r + i) * columns + first, room->sums + i * COLUMNS, (size_t)count * 4);
            }
        }
    }
}

/* The same of rows times rows, of which there are too few to write a panel for. */
static void add_up_few(const uint8_t *left, Operand of, Py_ssize_t rows, const uint8_t *right, Operand of_right,
                       Py_ssize_t columns, Py_ssize_t terms, int32_t *sums)
{
    int16_t wide[TERMS];
    memset(sums, 0, (size_t)(rows * columns) * 4);
    for (Py_ssize_t r = 0; r < rows; r++, sums += columns)
        for (Py_ssize_t begin = 0; begin < terms; begin += TERMS) {
            const Py_ssize_t n = terms - begin < TERMS ? terms - begin : TERMS;
            int32_t all = 0;
            widen(left + r * terms + begin, of, wide, n);
            for (Py_ssize_t k = 0; k < n; k++)
                all += wide[k];
            for (Py_ssize_t c = 0; c < columns; c++)
                sums[c] += dot(wide, right + c * terms + begin, of_right.flip, n) - all * of_right.zero;
        }
}

/* One kernel over one plane, all outputs in one run: what the ends of rows give is left out at last, which costs less
 * than starting anew for each row. The plane comes in step_y * step_x parts, in which the taps of neighbouring outputs
 * are neighbours; `at` are where the kernel's `count` taps begin. Sums are exact in floats: at most PLANE_TAPS products
 * below 2**16 each. */
CLONES static void slide(const float *restrict plane, const Py_ssize_t *at, const int16_t *taps, Py_ssize_t count,
                         float *restrict sums, Py_ssize_t n)
{
    Py_ssize_t k = 0;
    memset(sums, 0, (size_t)n * sizeof *sums);
    for (; k + 2 < count; k += 3) { /* three at a time: sums are read and written a third as often */
        const float *restrict a = plane + at[k], *restrict b = plane + at[k + 1], *restrict c = plane + at[k + 2];
        const float of_a = taps[k], of_b = taps[k + 1], of_c = taps[k + 2];
        for (Py_ssize_t i = 0; i < n; i++)
            sums[i] += of_a * a[i] + of_b * b[i] + of_c * c[i];
    }
    for (; k < count; k++) {
        const float *restrict a = plane + at[k];
        const float of_a = taps[k];
        for (Py_ssize_t i = 0; i < n; i++)
            sums[i] += of_a * a[i];
    }
}

/* The image's one plane, its codes less the zero point, into the parts of `plane`; what is outside is zero there. */
CLONES static void spread(const Image *im, Py_ssize_t pitch, Py_ssize_t area, float *plane)
{
    const Py_ssize_t step = im->step_x;
    const Operand of = im->of;
    for (Py_ssize_t y = 0; y < im->h; y++) {
        const uint8_t *restrict in = im->data + y * im->w;
        const Py_ssize_t down = y + im->top;
        float *row = plane + down % im->step_y * step * area + down / im->step_y * pitch;
        for (Py_ssize_t i = 0; i < step && i < im->w; i++) {
            float *restrict to = row + (im->left + i) % step * area + (im->left + i) / step;
            if (step == 1)
                for (Py_ssize_t x = 0; x < im->w; x++)
                    to[x] = (float)((in[x] ^ of.flip) - of.zero);
            else
                for (Py_ssize_t x = i; x < im->w; x += step)
                    *to++ = (float)((in[x] ^ of.flip) - of.zero);
        }
    }
}

CLONES static void narrow(const float *restrict in, Py_ssize_t pitch, int32_t *restrict out, Py_ssize_t rows,
                          Py_ssize_t columns)
{
    for (Py_ssize_t y = 0; y < rows; y++, in += pitch, out += columns)
        for (Py_ssize_t x = 0; x < columns; x++)
            out[x] = (int32_t)in[x];
}

/* Kernels [each, kh, kw] over the image's one plane to [each, rows, across]. The sums are behind the plane's parts. */
static void slide_over(const Image *im, const uint8_t *kernels, Operand of, Py_ssize_t each, Py_ssize_t rows,
                       Py_ssize_t pitch, Py_ssize_t area, const Py_ssize_t *at, float *plane, int32_t *out)
{
    const Py_ssize_t taps = im->kh * im->kw;
    float *sums = plane + im->step_y * im->step_x * area;
    int16_t wide[PLANE_TAPS];
    spread(im, pitch, area, plane);
    for (Py_ssize_t k = 0; k < each; k++, out += rows * im->across) {
        widen(kernels + k * taps, of, wide, taps);
        slide(plane, at, wide, taps, sums, (rows - 1) * pitch + im->across);
        narrow(sums, pitch, out, rows, im->across);
    }
}

/* Signed codes and their zero point as unsigned ones; 0 if the zero point is no code. */
static int operand(int is_signed, int zero, Operand *of)
{
    of->flip = is_signed ? 0x80 : 0;
    of->zero = zero + of->flip;
    return zero >= -of->flip && of->zero <= 255;
}

/* The product of `count` numbers, or 0 where one is below 1 or it has no room in 62 bits. */
static Py_ssize_t product_of(const Py_ssize_t *numbers, int count)
{
    Py_ssize_t found = 1;
    for (int i = 0; i < count; i++) {
        if (numbers[i] < 1 || numbers[i] > ((Py_ssize_t)1 << 61) / found)
            return 0;
        found *= numbers[i];
    }
    return found;
}

#define PRODUCT(...) product_of((const Py_ssize_t[]){__VA_ARGS__}, sizeof((Py_ssize_t[]){__VA_ARGS__}) / sizeof(Py_ssize_t))

/* n * groups images of im->channels planes each, o kernels in all, `rows` outputs high. 0 if memory is short. */
static int over_images(Tile *tile, Image *im, const uint8_t *data, Py_ssize_t n, Py_ssize_t groups, const uint8_t *kernels,
                       Operand of, Py_ssize_t o, Py_ssize_t rows, int32_t *out)
{
    const Py_ssize_t each = o / groups, terms = im->channels * im->kh * im->kw, columns = rows * im->across;
    const Py_ssize_t size = im->channels * im->h * im->w;
    if (terms == im->channels && im->step_y == 1 && im->step_x == 1 && !im->top && !im->left && rows == im->h
        && im->across == im->w) { /* pixel after pixel: one long row */
        im->across = im->w = columns;
        im->h = rows = 1;
    }
    const Py_ssize_t reach_y = (rows - 1) * im->step_y + (im->kh - 1) * im->apart_y + 1;
    const Py_ssize_t reach_x = (im->across - 1) * im->step_x + (im->kw - 1) * im->apart_x + 1;
    const Py_ssize_t high = reach_y > im->h + im->top ? reach_y : im->h + im->top;
    const Py_ssize_t wide = reach_x > im->w + im->left ? reach_x : im->w + im->left;
    const Py_ssize_t pitch = (wide + im->step_x - 1) / im->step_x, area = PRODUCT(pitch, 1 + (high - 1) / im->step_y);
    const Py_ssize_t floats = PRODUCT(area, im->step_y * im->step_x + 1); /* parts, and sums of no more than one */
    const int slides = im->channels == 1 && each < ROWS && terms <= PLANE_TAPS && floats && floats <= PLANE;
    Py_ssize_t at[PLANE_TAPS];
    for (Py_ssize_t k = 0; slides && k < terms; k++) {
        const Py_ssize_t y = k / im->kw * im->apart_y, x = k % im->kw * im->apart_x;
        at[k] = (y % im->step_y * im->step_x + x % im->step_x) * area + y / im->step_y * pitch + x / im->step_x;
    }
    void *room = calloc(1, slides ? (size_t)floats * sizeof(float) : sizeof(Room));
    if (!room)
        return 0;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < n * groups; i++) {
        const uint8_t *own = kernels + i % groups * each * terms;
        im->data = data + i * size;
        if (slides)
            slide_over(im, own, of, each, rows, pitch, area, at, room, out + i * each * columns);
        else
            add_up(tile, room, own, of, each, im, NULL, im->of, columns, terms, out + i * each * columns);
    }
    Py_END_ALLOW_THREADS
    free(room);
    return 1;
}

static PyObject *done(Py_buffer *x, Py_buffer *w, Py_buffer *out, int fits, int enough)
{
    PyBuffer_Release(x);
    PyBuffer_Release(w);
    PyBuffer_Release(out);
    if (!fits)
        PyErr_SetString(PyExc_ValueError, "sums of products: sizes, steps or zero points do not fit together");
    else if (!enough)
        PyErr_NoMemory();
    else
        Py_RETURN_NONE;
    return NULL;
}

/* product(x [m, k], w [n, k], out i32 [m, n], (m, n, k), (signed, zero) of x, of w, tile) */
static PyObject *product(PyObject *self, PyObject *args)
{
    Py_buffer x, w, out;
    Py_ssize_t m, n, k;
    int signed_x, zero_x, signed_w, zero_w, tile;
    Operand left, right;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*(nnn)(pi)(pi)i", &x, &w, &out, &m, &n, &k, &signed_x, &zero_x, &signed_w, &zero_w,
                          &tile))
        return NULL;
    const int fits = PRODUCT(m, n, k, 4) && x.len == m * k && w.len == n * k && out.len == 4 * m * n && tile >= 0
        && tile < tile_count && operand(signed_x, zero_x, &left) && operand(signed_w, zero_w, &right);
    Room *room = fits ? calloc(1, sizeof *room) : NULL;
    if (room) {
        Py_BEGIN_ALLOW_THREADS
        if (m < FEW)
            add_up_few(x.buf, left, m, w.buf, right, n, k, out.buf);
        else
            add_up(tiles[tile], room, x.buf, left, m, NULL, w.buf, right, n, k, out.buf);
        Py_END_ALLOW_THREADS
    }
    free(room);
    return done(&x, &w, &out, fits, room != NULL);
}

/* windows(x [n, c, h, w], w [o, c / groups, kh, kw], out i32 [n, o, y, x], (n, c, h, w), (o, c / groups, kh, kw), (y, x),
 *         (stride, stride), (dilation, dilation), (rows above, columns to the left), (signed, zero) of x, of w,
 *         last: w is [o, kh, kw, c / groups], tile) */
static PyObject *windows(PyObject *self, PyObject *args)
{
    Py_buffer x, w, out;
    Py_ssize_t n, c, o, rows;
    int signed_x, zero_x, signed_w, zero_w, tile;
    Image im;
    Operand left;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*y*w*(nnnn)(nnnn)(nn)(nn)(nn)(nn)(pi)(pi)pi", &x, &w, &out, &n, &c, &im.h, &im.w, &o,
                          &im.channels, &im.kh, &im.kw, &rows, &im.across, &im.step_y, &im.step_x, &im.apart_y,
                          &im.apart_x, &im.top, &im.left, &signed_x, &zero_x, &signed_w, &zero_w, &im.last, &tile))
        return NULL;
    const Py_ssize_t plane = PRODUCT(im.h, im.w), terms = PRODUCT(im.channels, im.kh, im.kw);
    const Py_ssize_t columns = PRODUCT(rows, im.across), limit = INT32_MAX;
    const int fits = PRODUCT(n, c, im.h, im.w) && PRODUCT(o, im.channels, im.kh, im.kw) && PRODUCT(n, o, columns, 4)
        && x.len == n * c * plane && w.len == o * terms && out.len == 4 * n * o * columns && c % im.channels == 0
        && o % (c / im.channels) == 0 && im.step_y > 0 && im.step_y <= limit && im.step_x > 0 && im.step_x <= limit
        && im.apart_y > 0 && im.apart_y <= limit && im.apart_x > 0 && im.apart_x <= limit && im.top >= 0
        && im.top <= limit && im.left >= 0 && im.left <= limit && im.kh <= limit && im.kw <= limit && rows <= limit
        && im.across <= limit && im.w <= limit && tile >= 0 && tile < tile_count && operand(signed_x, zero_x, &im.of)
        && operand(signed_w, zero_w, &left);
    const int enough = fits && over_images(tiles[tile], &im, x.buf, n, c / im.channels, w.buf, left, o, rows, out.buf);
    return done(&x, &w, &out, fits, enough);
}

static PyMethodDef methods[] = {
    {"product", product, METH_VARARGS, "Rows times rows."},
    {"windows", windows, METH_VARARGS, "Kernels over images."},
    {NULL, NULL, 0, NULL},
};

static int start(PyObject *module)
{
    find_tiles();
    return PyModule_AddIntConstant(module, "TILES", tile_count) | PyModule_AddIntConstant(module, "FEW", FEW);
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_sums", NULL, 0, methods, slots, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__sums(void)
{
    return PyModuleDef_Init(&module);
}
