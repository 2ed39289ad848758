/*
A tile of GK, or with -DSQUARINGS=n of GKpoly-n, in one pass over the cache, where torch would take
one pass for each operation. blockwise.py compiles this file and says what a tile is.
*/
#include <string.h>

/* f(x), and f'(x) in *slope */
#ifdef SQUARINGS
#define LAST (SQUARINGS < 6 ? SQUARINGS : 6)

/* b^(2^n) with b = 1 + x / 2^n, the first squarings on x: see gaussian_poly_ in blockwise.py */
static inline float f(float x, float *slope)
{
    float s = 1;
#pragma GCC unroll 16
    for (int m = SQUARINGS; m > LAST; m--) {
        s += s * x / (1 << m);
        x += x * x / (2 << m);
    }
    float b = 1 + x / (1 << LAST);
#pragma GCC unroll 16
    for (int m = 0; m < LAST; m++) {
        s *= b;
        b *= b;
    }
    *slope = s;
    return b;
}

#else

/*
exp(x) = 2^n exp(r) with n whole and |r| <= ln(2) / 2, where 7 terms of exp's series are enough.
A float32 above 2^23 has no fraction, so the last bits of z are n. n times the first part of ln 2 is
exact. 2^n is put together from its bits, which gives 0 below n = -126 and inf above n = 127.
*/
static inline float f(float x, float *slope)
{
    x = x < -88 ? -88 : x > 89 ? 89 : x; /* NaN stays NaN */
    float z = x * 1.44269504f + 12582912; /* x / ln 2 + 1.5 * 2^23 */
    float n = z - 12582912;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.f / 5040;
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 1.f / 2;
    p = p * r + 1;
    p = p * r + 1;
    unsigned bits;
    float power;
    memcpy(&bits, &z, sizeof bits);
    bits = (bits + 127) << 23;
    memcpy(&power, &bits, sizeof power);
    return *slope = p * power;
}
#endif

#ifdef DECAY
#define FADE_ARGUMENTS , const float *restrict fade, int fade_step, int heads
#define FADE * fi[j]
#else
#define FADE_ARGUMENTS
#define FADE
#endif

/*
x: N tiles of q k^T / sqrt(hs), rows by columns. The norms' terms are added to each score, and A
    takes the scores' place.
g: as many tiles of dy v^T, or NULL. The gradient of x takes their place.
g_rows (N x rows), g_columns (N x parts x columns): the sums of g over columns and over rows are
    added to them; g_columns has a part for every PART rows, so that no thread waits for another.
With -DDECAY: fade + (n % heads) * fade_step has the decay's factors of row 0, which A and g are
    multiplied by; those of each row below begin one place before.
diagonal: whether column j is the future of every row i < j, where A and g become 0.
*/
void tile(float *restrict x, float *restrict g, const float *restrict q_norm,
          const float *restrict k_norm, float *restrict g_rows, float *restrict g_columns,
          int N, int rows, int columns, int parts, int diagonal, int threads FADE_ARGUMENTS)
{
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int n = 0; n < N; n++)
        for (int part = 0; part < parts; part++)
            for (int i = part * PART; i < rows && i < (part + 1) * PART; i++) {
                long row = (long)n * rows + i;
                int seen = diagonal ? i + 1 : columns;
                const float *restrict kn = k_norm + (long)n * columns;
#ifdef DECAY
                const float *restrict fi = fade + (long)(n % heads) * fade_step - i;
#endif
                float *restrict xi = x + row * columns, qn = q_norm[row], sum = 0, slope;
                if (g) {
                    float *restrict gi = g + row * columns;
                    float *restrict gj = g_columns + ((long)n * parts + part) * columns;
#pragma omp simd reduction(+ : sum) private(slope)
                    for (int j = 0; j < columns; j++) {
                        float a = f(xi[j] + qn + kn[j], &slope);
                        xi[j] = j < seen ? a FADE : 0;
                        gi[j] = j < seen ? gi[j] * slope FADE : 0;
                        gj[j] += gi[j];
                        sum += gi[j];
                    }
                    g_rows[row] += sum;
                } else {
#pragma omp simd private(slope)
                    for (int j = 0; j < columns; j++) {
                        float a = f(xi[j] + qn + kn[j], &slope);
                        xi[j] = j < seen ? a FADE : 0;
                    }
                }
            }
}
