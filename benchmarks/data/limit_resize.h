/* The resize of limit.c: tables of weights, and the two passes. Fixed point, AVX2. */
#include <immintrin.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SIZE = 224, CHANNELS = 3, ROW = SIZE * CHANNELS, PAD = 16 };
enum { HORIZONTAL_BITS = 14, KEPT_BITS = 7 }; /* of a weight, and of a horizontally resized value (int16) */

enum work { FULL, REGION, BILINEAR, ANTIALIAS };

/* One direction of a resize: output i is the sum of weights[i * taps + j] * input[first[i] + j]. */
typedef struct {
    int taps; /* even */
    int first[SIZE];
    int count[SIZE]; /* of taps that are not padding */
    int16_t *weights;
    size_t capacity;
} table_t;

static float SCALE[ROW], BIAS[ROW]; /* from KEPT_BITS fixed point to normalised */

static void *xrealloc(void *old, size_t size) {
    void *p = realloc(old, size);
    if (!p) {
        perror("limit");
        exit(1);
    }
    return p;
}

static const double NOTHING = 1e-9; /* a weight at the very end of the triangle */

static double triangle(double x) {
    x = fabs(x);
    return x < 1 ? 1 - x : 0;
}

/* Weights in fixed point with `bits`, adding up to exactly one (or 32767 where one does not fit an int16). */
static void quantise(const double *weights, int count, int bits, int16_t *out) {
    int one = 1 << bits, sum = 0, largest = 0;
    double total = 0;
    for (int j = 0; j < count; j++) total += weights[j];
    for (int j = 0; j < count; j++) {
        int w = (int)lrint(weights[j] / total * one);
        out[j] = (int16_t)(w > INT16_MAX ? INT16_MAX : w);
        sum += w;
        if (weights[j] > weights[largest]) largest = j;
    }
    int corrected = out[largest] + one - sum;
    out[largest] = (int16_t)(corrected > INT16_MAX ? INT16_MAX : corrected);
}

/* Pillow's precompute_coeffs with the triangle, or two taps around the centre; `flip` reverses the outputs. */
static void make_table(table_t *table, enum work work, int input, bool flip, int bits) {
    double scale = (double)input / SIZE, stretch = work == ANTIALIAS && scale > 1 ? scale : 1;
    /* As many pixels as lie within a triangle 2 * stretch wide, rounded up to a multiply-add of two. */
    int even = work == BILINEAR ? 2 : ((int)ceil(2 * stretch) + 1) & ~1;
    table->taps = even;
    size_t needed = (size_t)even * SIZE;
    if (needed > table->capacity) {
        table->weights = xrealloc(table->weights, needed * sizeof(int16_t));
        table->capacity = needed;
    }
    memset(table->weights, 0, needed * sizeof(int16_t));
    double window[even + 2];
    for (int i = 0; i < SIZE; i++) {
        double centre = (i + 0.5) * scale;
        int to = flip ? SIZE - 1 - i : i, first, count;
        double *weights = window;
        if (work == BILINEAR) {
            double at = centre - 0.5;
            if (at < 0) at = 0;
            first = (int)at;
            count = first + 1 < input ? 2 : 1;
            weights[1] = at - first;
            weights[0] = count == 2 ? 1 - weights[1] : 1;
        } else {
            first = (int)(centre - stretch + 0.5);
            if (first < 0) first = 0;
            int last = (int)(centre + stretch + 0.5);
            if (last > input) last = input;
            count = last - first;
            for (int j = 0; j < count; j++) weights[j] = triangle((first + j - centre + 0.5) / stretch);
            while (count > 1 && weights[count - 1] < NOTHING) count--;
            for (; count > 1 && weights[0] < NOTHING; count--) weights++, first++;
        }
        table->first[to] = first;
        table->count[to] = count;
        quantise(weights, count, bits, table->weights + (size_t)to * even);
    }
}

/* ---- the two passes ---- */

/* One decoded row of RGBX to SIZE pixels of RGB. Four values are stored a pixel; the next pixel overwrites the X. */
static inline __attribute__((always_inline)) void resize_row_taps(const unsigned char *row, const table_t *table,
                                                                  int16_t *out, const int taps) {
    const __m128i pairs = _mm_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
    const __m256i fours = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,
                                           8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
    const __m128i half = _mm_set1_epi32(1 << (HORIZONTAL_BITS - KEPT_BITS - 1));
    const int16_t *weights = table->weights;
    for (int i = 0; i < SIZE; i++, weights += taps) {
        const unsigned char *pixels = row + 4 * (size_t)table->first[i];
        __m128i sum = half;
        int j = 0;
        if (taps >= 4) {
            __m256i sums = _mm256_setzero_si256();
            for (; j + 4 <= taps; j += 4) {
                __m256i four = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(pixels + 4 * j)));
                int w01, w23;
                memcpy(&w01, weights + j, 4);
                memcpy(&w23, weights + j + 2, 4);
                __m256i w = _mm256_set_m128i(_mm_set1_epi32(w23), _mm_set1_epi32(w01));
                sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(four, fours), w));
            }
            sum = _mm_add_epi32(sum, _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1)));
        }
        for (; j < taps; j += 2) {
            int w01;
            memcpy(&w01, weights + j, 4);
            __m128i two = _mm_shuffle_epi8(_mm_loadl_epi64((const __m128i *)(pixels + 4 * j)), pairs);
            sum = _mm_add_epi32(sum, _mm_madd_epi16(two, _mm_set1_epi32(w01)));
        }
        sum = _mm_srai_epi32(sum, HORIZONTAL_BITS - KEPT_BITS);
        _mm_storel_epi64((__m128i *)(out + CHANNELS * i), _mm_packs_epi32(sum, sum));
    }
}

static void resize_row(const unsigned char *row, const table_t *table, int16_t *out) {
    switch (table->taps) { /* the common counts as constants, so that their loops unroll */
    case 2: resize_row_taps(row, table, out, 2); break;
    case 4: resize_row_taps(row, table, out, 4); break;
    case 6: resize_row_taps(row, table, out, 6); break;
    default: resize_row_taps(row, table, out, table->taps);
    }
}

/* The weighted sum of `count` rows; weights have 15 bits, the sum keeps KEPT_BITS. */
static inline __m256i sum_rows(const int16_t *const *rows, const int16_t *weights, int count, int at) {
    __m256i sum = _mm256_setzero_si256();
    for (int j = 0; j < count; j++) {
        __m256i value = _mm256_loadu_si256((const __m256i *)(rows[j] + at));
        sum = _mm256_add_epi16(sum, _mm256_mulhrs_epi16(value, _mm256_set1_epi16(weights[j])));
    }
    return sum;
}

static void finish_float(const int16_t *const *rows, const int16_t *weights, int count, float *out) {
    for (int at = 0; at < ROW; at += 16) {
        __m256i sum = sum_rows(rows, weights, count, at);
        __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)));
        __m256 high = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1)));
        _mm256_storeu_ps(out + at, _mm256_fmadd_ps(low, _mm256_loadu_ps(SCALE + at), _mm256_loadu_ps(BIAS + at)));
        _mm256_storeu_ps(out + at + 8,
                         _mm256_fmadd_ps(high, _mm256_loadu_ps(SCALE + at + 8), _mm256_loadu_ps(BIAS + at + 8)));
    }
}

static void finish_bytes(const int16_t *const *rows, const int16_t *weights, int count, unsigned char *out) {
    const __m256i half = _mm256_set1_epi16(1 << (KEPT_BITS - 1));
    for (int at = 0; at < ROW; at += 32) {
        __m256i low = sum_rows(rows, weights, count, at), high = sum_rows(rows, weights, count, at + 16);
        low = _mm256_srai_epi16(_mm256_adds_epi16(low, half), KEPT_BITS);
        high = _mm256_srai_epi16(_mm256_adds_epi16(high, half), KEPT_BITS);
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, high), 0xd8);
        _mm256_storeu_si256((__m256i *)(out + at), bytes);
    }
}
