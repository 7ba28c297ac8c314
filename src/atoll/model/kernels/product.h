// The one product that everything is made of: a few rows of activations times a panel of 32 columns.
//
//     out[m][n] (+)= sum over k of x[m][k] * w[k][n]        m < rows, n < 32, float32 sums of bfloat16 products
//
// A panel is packed as [k / 2][32][2]: the 32 columns' pairs of one k-pair lie together, so a step reads two vectors of weights and one pair of x a row.
// Linears, attention scores (a page's keys are a panel) and attention outputs (its values are panels) all come here. Every out[m][n] is summed in
// order of k in one accumulator, so a row's result is the same alone, in any batch and in any chunk of its prompt.
//
// With AMX the same panel is a pile of tiles [16 k-pairs][16 columns][2], and 32 rows go at a time. Its sums have their own order, the same for each row.
#pragma once

#include <algorithm>

#include "simd.h"
#if defined(ATOLL_AMX)
#include "amx.h"
#endif

namespace kernels {

constexpr int PANEL = 32;            // columns
constexpr int PAIR_STRIDE = 2 * PANEL;  // bfloat16 numbers of one k-pair of a panel

#if defined(__AVX512F__)
constexpr int MOST_ROWS = 12;  // 24 of 32 registers are sums
#else
constexpr int MOST_ROWS = 3;  // twelve of AVX2's sixteen
#endif

// While a panel is in use the next one is fetched: `ahead` points to it (null: none), and every step asks for its share.
template <int ROWS>
void product_of(float* out, long out_stride, const bf16* x, long x_stride, const bf16* w, int pairs, bool add, const char* ahead, int ahead_step) {
    Vec sums[ROWS][2];
    for (int m = 0; m < ROWS; m++) {
        sums[m][0] = add ? load(out + m * out_stride) : Vec{};
        sums[m][1] = add ? load(out + m * out_stride + LANES) : Vec{};
    }
    auto steps = [&](auto lines) {
        for (int k = 0; k < pairs; k++) {
            if constexpr (lines >= 1) prefetch(ahead);
            if constexpr (lines == 2) prefetch(ahead + 64);
            if constexpr (lines >= 1) ahead += ahead_step;
            Pairs left = load_pairs(w + k * PAIR_STRIDE), right = load_pairs(w + k * PAIR_STRIDE + LANES * 2);
#pragma GCC unroll 12
            for (int m = 0; m < ROWS; m++) {
                Pairs both = pair(x + m * x_stride + 2 * k);
                sums[m][0] = dot2(sums[m][0], left, both);
                sums[m][1] = dot2(sums[m][1], right, both);
            }
        }
    };
    if (!ahead) steps(std::integral_constant<int, 0>{});
    else if (ahead_step > 64) steps(std::integral_constant<int, 2>{});
    else steps(std::integral_constant<int, 1>{});
    for (int m = 0; m < ROWS; m++) {
        store(out + m * out_stride, sums[m][0]);
        store(out + m * out_stride + LANES, sums[m][1]);
    }
}

using Product = void (*)(float*, long, const bf16*, long, const bf16*, int, bool, const char*, int);

template <int... I> inline Product pick(int rows, std::integer_sequence<int, I...>) {
    static const Product table[] = {product_of<I + 1>...};
    return table[rows - 1];
}

// out [rows][32] (+)= x [rows][2 * pairs] times a panel; strides in elements.
inline void product(int rows, float* out, long out_stride, const bf16* x, long x_stride, const bf16* w, int pairs, bool add, const bf16* ahead) {
    int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS, step = PAIR_STRIDE * 2 / blocks;
    const char* next = (const char*)ahead;
    for (int b = 0, m = 0; b < blocks; b++) {
        int size = (rows - m + blocks - b - 1) / (blocks - b);
        pick(size, std::make_integer_sequence<int, MOST_ROWS>{})(out + m * out_stride, out_stride, x + m * x_stride, x_stride, w, pairs, add, next, step);
        m += size;
        if (next) next += (long)pairs * step;
    }
}

// The same for linears' long sums, where AMX pays. x must be readable up to a multiple of 16 rows and zero beyond its columns up to a multiple of 32.
inline void long_product(int rows, float* out, long out_stride, const bf16* x, long x_stride, const bf16* w, int pairs, const bf16* ahead) {
#if defined(ATOLL_AMX)
    amx_product(rows, out, out_stride, x, x_stride, w, pairs, ahead);
#else
    product(rows, out, out_stride, x, x_stride, w, pairs, false, ahead);
#endif
}

}  // namespace kernels
