// One resident adapter as the forward reads it: every site's factors in one block of memory, in the order of their use.
//
//     A  [d_in / 2][R][2]   R: the ranks of the linears that share the input (q k v; gate up) behind one another, in all a multiple of 16
//     B  by 16 output columns: [pairs of ranks that reach these columns][16][2], the scaling folded in
//
// A row's update is z = x Aᵀ, rounded to bfloat16, and then a few more steps of k on the sums of its linear (product.h).
#pragma once

#include <cstdlib>
#include <vector>

#include "simd.h"

namespace kernels {

inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where an output column of a packed linear comes from.
struct Column {
    int member = -1;  // of the group: 0 for q, 1 for k, ...; -1: padding
    int index = 0;
};

// B for 16 columns: pairs [first, first + count) of z, from `offset` on.
struct Block {
    int first = 0, count = 0;
    long offset = 0;
};

struct Site {
    int rank = 0;  // R; 0: the adapter changes nothing here
    long a = 0;
    std::vector<int> z_start;  // of each member, in ranks
    std::vector<Block> blocks;
};

struct Adapter {
    std::vector<Site> sites;  // layer * 4 + group
    bf16* memory = nullptr;
    long size = 0;  // bfloat16 numbers
    int widest = 0;
    ~Adapter() { free(memory); }
};

// Rows [rows][k] times A: z [rows][R] bfloat16. Two sums a rank, of even and of odd k-pairs, whatever the number of rows.
template <int ROWS, int VECS>
void shrink_of(const bf16* x, long x_stride, const bf16* a, int rank, int pairs, bf16* z, long z_stride) {
    Vec sums[ROWS][VECS][2] = {};
    for (int k = 0; k < pairs; k += 2)
        for (int odd = 0; odd < 2; odd++) {
            const bf16* step = a + (long)(k + odd) * rank * 2;
            prefetch((const char*)step + 2048);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) {
                Pairs both = pair(x + m * x_stride + 2 * (k + odd));
#pragma GCC unroll 4
                for (int v = 0; v < VECS; v++) sums[m][v][odd] = dot2(sums[m][v][odd], load_pairs(step + v * 2 * LANES), both);
            }
        }
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECS; v++) store_narrow(z + m * z_stride + v * LANES, sums[m][v][0] + sums[m][v][1]);
}

inline void shrink(int rows, const bf16* x, long x_stride, const bf16* a, int rank, int pairs, bf16* z, long z_stride) {
    for (int v = 0; v < rank / LANES;) {
        int left = rank / LANES - v;
        for (int m = 0; m < rows;) {
            const bf16 *xm = x + m * x_stride, *av = a + v * 2 * LANES;
            bf16* zm = z + m * z_stride + v * LANES;
            bool four = rows - m >= 4;
            if (left >= 3) four ? shrink_of<4, 3>(xm, x_stride, av, rank, pairs, zm, z_stride) : shrink_of<1, 3>(xm, x_stride, av, rank, pairs, zm, z_stride);
            else if (left == 2) four ? shrink_of<4, 2>(xm, x_stride, av, rank, pairs, zm, z_stride) : shrink_of<1, 2>(xm, x_stride, av, rank, pairs, zm, z_stride);
            else four ? shrink_of<4, 1>(xm, x_stride, av, rank, pairs, zm, z_stride) : shrink_of<1, 1>(xm, x_stride, av, rank, pairs, zm, z_stride);
            m += four ? 4 : 1;
        }
        v += left >= 3 ? 3 : left;
    }
}

// Add one row's update to its sums for 16-column blocks [from, to): more steps of k on the same accumulators. ahead: the same site of the adapter that
// comes next (null: none), fetched meanwhile.
inline void expand(float* sums, const Block* blocks, int from, int to, const bf16* b, const bf16* z, const bf16* ahead) {
    for (int block = from; block < to; block++, sums += LANES) {
        const Block& at = blocks[block];
        if (!at.count) continue;
        const bf16* step = b + at.offset;
        long distance = ahead ? ahead - step : 0;
        Vec sum = load(sums);
        for (int p = 0; p < at.count; p++, step += 2 * LANES) {
            prefetch(step + distance);
            sum = dot2(sum, load_pairs(step), pair(z + 2 * (at.first + p)));
        }
        store(sums, sum);
        if (ahead) ahead += (long)at.count * 2 * LANES;
    }
}

}  // namespace kernels
