/* The inner loops of _floats.c for one width of vectors: LANES floats in each, tiles of ROWS rows and two vectors.
 * Included once for each processor level, with NAME(x) making the names different.
 *
 * No result depends on LANES or ROWS: each sum of products is one chain in the order of k (dots: sixteen chains, sums
 * of elements: sixty-four, then the chains in their order), with one rounding a step where the processor has that. */
typedef float NAME(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(mask) __attribute__((vector_size(4 * LANES)));
#define VEC NAME(vec)
#define COLUMNS (2 * LANES)

static inline VEC NAME(all)(float x)
{
    return x - (VEC){0};
}

/* Where `mask` is set a, else b. */
static inline VEC NAME(chosen)(NAME(mask) mask, VEC a, VEC b)
{
    return (VEC)((mask & (NAME(mask))a) | (~mask & (NAME(mask))b));
}

/* NaN stays. */
static inline VEC NAME(clamped)(VEC x, VEC low, VEC high)
{
    x = NAME(chosen)(low > x, low, x);
    return NAME(chosen)(high < x, high, x);
}

/* out[r][c] = clamp(first[c] + bias[r] + sum over k of w[r][k] * panel[k][c]) for `rows` rows; `rows` is a constant
 * wherever this is inlined. The first `columns` of the two vectors are stored. */
static inline __attribute__((always_inline)) void NAME(tile)(const int rows, const loose *w, Py_ssize_t depth,
                                                             const float *panel, const float *first,
                                                             const loose *bias, float *out, Py_ssize_t pitch,
                                                             Py_ssize_t columns, float low, float high)
{
    VEC sums[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const VEC b = NAME(all)(bias ? bias[r] : 0.0f);
        sums[r][0] = *(const VEC *)first + b;
        sums[r][1] = *(const VEC *)(first + LANES) + b;
    }
    for (Py_ssize_t k = 0; k < depth; k++, panel += COLUMNS) {
        const VEC p = *(const VEC *)panel, q = *(const VEC *)(panel + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < rows; r++) {
            const VEC a = NAME(all)(w[r * depth + k]);
            sums[r][0] += a * p;
            sums[r][1] += a * q;
        }
    }
    const VEC least = NAME(all)(low), most = NAME(all)(high);
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++) {
        const VEC x = NAME(clamped)(sums[r][0], least, most), y = NAME(clamped)(sums[r][1], least, most);
        float *to = out + r * pitch;
        if (columns == COLUMNS) {
            *(VEC *)to = x;
            *(VEC *)(to + LANES) = y;
        } else {
            float both[COLUMNS];
            *(VEC *)both = x;
            *(VEC *)(both + LANES) = y;
            memcpy(to, both, (size_t)columns * 4);
        }
    }
}

/* All rows against one panel of COLUMNS columns. */
static void NAME(rows)(Py_ssize_t rows, const loose *w, Py_ssize_t depth, const float *panel, const float *first,
                       const loose *bias, float *out, Py_ssize_t pitch, Py_ssize_t columns, float low, float high)
{
    Py_ssize_t r = 0;
#define TILE(n)                                                                                                    \
    NAME(tile)(n, w + r * depth, depth, panel, first, bias ? bias + r : NULL, out + r * pitch, pitch, columns, low, high)
    for (; r + ROWS <= rows; r += ROWS)
        TILE(ROWS);
    for (; r + 4 <= rows; r += 4)
        TILE(4);
    for (; r + 2 <= rows; r += 2)
        TILE(2);
    if (r < rows)
        TILE(1);
#undef TILE
}

/* sum of a[k] * b[k]: chain i takes k = i, i + 16 ... */
static float NAME(dot)(const loose *a, const loose *b, Py_ssize_t depth)
{
    VEC sums[16 / LANES] = {{0}};
    float chains[16], total = 0;
    Py_ssize_t k = 0;
    for (; k + 16 <= depth; k += 16)
#pragma GCC unroll 4
        for (int i = 0; i < 16 / LANES; i++) {
            VEC x, y;
            memcpy(&x, a + k + i * LANES, sizeof x);
            memcpy(&y, b + k + i * LANES, sizeof y);
            sums[i] += x * y;
        }
    memcpy(chains, sums, sizeof chains);
    for (int i = 0; k < depth; i++, k++)
        chains[i] += a[k] * b[k];
    for (int i = 0; i < 16; i++)
        total += chains[i];
    return total;
}

/* out[i] = clamp(bias + sum over taps of w[t] * in[offset[t] + i]) for i below n, which is a multiple of LANES. */
static void NAME(taps)(const float *in, const Py_ssize_t *offset, const loose *w, int taps, float bias, float *out,
                       Py_ssize_t n, float low, float high)
{
    const VEC least = NAME(all)(low), most = NAME(all)(high), b = NAME(all)(bias);
    Py_ssize_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) { /* four chains hide the time that a product takes */
        VEC s0 = b, s1 = b, s2 = b, s3 = b;
        for (int t = 0; t < taps; t++) {
            const float *from = in + offset[t] + i;
            const VEC a = NAME(all)(w[t]);
            s0 += a * *(const VEC *)from;
            s1 += a * *(const VEC *)(from + LANES);
            s2 += a * *(const VEC *)(from + 2 * LANES);
            s3 += a * *(const VEC *)(from + 3 * LANES);
        }
        *(VEC *)(out + i) = NAME(clamped)(s0, least, most);
        *(VEC *)(out + i + LANES) = NAME(clamped)(s1, least, most);
        *(VEC *)(out + i + 2 * LANES) = NAME(clamped)(s2, least, most);
        *(VEC *)(out + i + 3 * LANES) = NAME(clamped)(s3, least, most);
    }
    for (; i < n; i += LANES) {
        VEC s = b;
        for (int t = 0; t < taps; t++)
            s += NAME(all)(w[t]) * *(const VEC *)(in + offset[t] + i);
        *(VEC *)(out + i) = NAME(clamped)(s, least, most);
    }
}

/* The least, the largest (of numbers: NaN is passed by) and the sum (which NaN stays in), of n > 0 elements. */
static void NAME(extremes)(const loose *x, Py_ssize_t n, float found[3])
{
    VEC lows[64 / LANES], highs[64 / LANES], sums[64 / LANES];
    float low[64], high[64], sum[64];
    Py_ssize_t i = 0;
    for (int j = 0; j < 64 / LANES; j++) {
        lows[j] = NAME(all)(INFINITY);
        highs[j] = NAME(all)(-INFINITY);
        sums[j] = NAME(all)(0);
    }
    for (; i + 64 <= n; i += 64)
#pragma GCC unroll 16
        for (int j = 0; j < 64 / LANES; j++) {
            VEC v;
            memcpy(&v, x + i + j * LANES, sizeof v);
            lows[j] = NAME(chosen)(v < lows[j], v, lows[j]);
            highs[j] = NAME(chosen)(v > highs[j], v, highs[j]);
            sums[j] += v;
        }
    memcpy(low, lows, sizeof low);
    memcpy(high, highs, sizeof high);
    memcpy(sum, sums, sizeof sum);
    for (int j = 0; i < n; i++, j++) {
        low[j] = x[i] < low[j] ? x[i] : low[j];
        high[j] = x[i] > high[j] ? x[i] : high[j];
        sum[j] += x[i];
    }
    found[0] = INFINITY, found[1] = -INFINITY, found[2] = 0;
    for (int j = 0; j < 64; j++) {
        found[0] = low[j] < found[0] ? low[j] : found[0];
        found[1] = high[j] > found[1] ? high[j] : found[1];
        found[2] += sum[j];
    }
}

/* x / scale to the nearest whole number, ties to even, between low and high; NaN becomes low. Adding 3 * 2^22 leaves no
 * bit behind the point for what lies between these. */
static inline float NAME(step)(float x, float scale, float low, float high)
{
    float q = x / scale;
    q = q > low ? q : low;
    q = q < high ? q : high;
    return (q + 12582912.0f) - 12582912.0f;
}

static void NAME(quantize8)(const loose *restrict x, uint8_t *restrict out, Py_ssize_t n, float scale, int zero, float low,
                            float high)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = (uint8_t)((int32_t)NAME(step)(x[i], scale, low, high) + zero);
}

static void NAME(quantize16)(const loose *restrict x, uint16_t *restrict out, Py_ssize_t n, float scale, int zero, float low,
                             float high)
{
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = (uint16_t)((int32_t)NAME(step)(x[i], scale, low, high) + zero);
}

/* In place, or not. */
static void NAME(shown)(const loose *x, float *out, Py_ssize_t n, float scale, float low, float high)
{
#pragma GCC ivdep
    for (Py_ssize_t i = 0; i < n; i++)
        out[i] = NAME(step)(x[i], scale, low, high) * scale;
}

#define DEQUANTIZE(type)                                                                                           \
    static void NAME(from_##type)(const void *codes, float *restrict out, Py_ssize_t n, float scale, int32_t zero) \
    {                                                                                                              \
        const loose_##type *restrict q = codes;                                                                    \
        for (Py_ssize_t i = 0; i < n; i++)                                                                         \
            out[i] = (float)(int32_t)((uint32_t)(int32_t)q[i] - (uint32_t)zero) * scale;                           \
    }
DEQUANTIZE(int8_t)
DEQUANTIZE(uint8_t)
DEQUANTIZE(int16_t)
DEQUANTIZE(uint16_t)
DEQUANTIZE(int32_t)
#undef DEQUANTIZE

static const struct loops NAME(loops) = {
    COLUMNS, NAME(rows), NAME(dot), NAME(taps), NAME(extremes), NAME(quantize8), NAME(quantize16), NAME(shown),
    {NAME(from_int8_t), NAME(from_uint8_t), NAME(from_int16_t), NAME(from_uint16_t), NAME(from_int32_t)},
};
#undef VEC
#undef COLUMNS
#undef NAME
#undef LANES
#undef ROWS
