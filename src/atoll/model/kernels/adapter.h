// One resident adapter as the forward reads it: every site's factors in one block of memory, in the order of their use.
//
//     A  [d_in / 2][R][2]   R: the ranks of the linears that share the input (q k v; gate up) behind one another, in all a multiple of 16
//     B  by 16 output columns: [pairs of ranks that reach these columns][16][2], the scaling folded in
//
// A row's update is z = x Aᵀ, rounded to bfloat16, and then a few more steps of k on the sums of its linear (product.h).
#pragma once

#include <algorithm>
#include <vector>

#include "shape.h"

namespace kernels {

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
    std::vector<float> gain;  // DoRA's, of each packed column, 1 for linears without; empty: nothing is scaled
};

struct Adapter {
    std::vector<Site> sites;  // layer * 4 + group
    bf16* memory = nullptr;
    long size = 0;  // bfloat16 numbers
    int widest = 0;
    Adapter() = default;
    Adapter(const Adapter&) = delete;
    ~Adapter() { free(memory); }
};

constexpr size_t READ_AHEAD = 4096;  // bytes behind the last factor that a prefetch may name

// Give every site of an adapter with these ranks ([layers][7]: q k v o gate up down) its place.
inline void lay_out(Adapter& adapter, const Shape& s, const int32_t* ranks) {
    adapter.sites.resize((size_t)s.layers * GROUPS);
    for (int layer = 0; layer < s.layers; layer++)
        for (int group = 0, first = 0; group < GROUPS; first += s.num_members(group), group++) {
            Site& site = adapter.sites[layer * GROUPS + group];
            const int32_t* rank = ranks + layer * 7 + first;
            int total = 0;
            for (int member = 0; member < s.num_members(group); member++) { site.z_start.push_back(total); total += up_to(rank[member], 2); }
            if (!total) continue;
            site.rank = up_to(total, LANES);
            adapter.widest = std::max(adapter.widest, site.rank);
            site.a = adapter.size;
            adapter.size += (long)up_to(s.input(group), PANEL) * site.rank;
            for (int c = 0; c < s.columns(group); c += LANES) {
                int low = total, high = 0;
                for (int i = 0; i < LANES; i++) {
                    int member = s.column(group, c + i).member;
                    if (member < 0 || !rank[member]) continue;
                    low = std::min(low, site.z_start[member]);
                    high = std::max(high, site.z_start[member] + up_to(rank[member], 2));
                }
                site.blocks.push_back({low / 2, std::max(0, high - low) / 2, adapter.size});
                adapter.size += (long)site.blocks.back().count * 2 * LANES;
            }
        }
}

// Fill in one linear's factors: a [rank][d_in], b [d_out][rank].
inline void set_factors(Adapter& adapter, const Shape& s, int layer, int group, int member, const float* a, const float* b, int rank, float scaling) {
    Site& site = adapter.sites[layer * GROUPS + group];
    int k = s.input(group), start = site.z_start[member];
    auto both = [](float low, float high) { return (uint32_t)narrow(low) | (uint32_t)narrow(high) << 16; };
    for (int i = 0; i < k; i += 2) {
        uint32_t* to = (uint32_t*)(adapter.memory + site.a) + (long)(i / 2) * site.rank + start;
        for (int r = 0; r < rank; r++) to[r] = both(a[(long)r * k + i], i + 1 < k ? a[(long)r * k + i + 1] : 0.0f);
    }
    for (int c = 0; c < s.columns(group); c++) {
        Column column = s.column(group, c);
        if (column.member != member) continue;
        const Block& block = site.blocks[c / LANES];
        uint32_t* to = (uint32_t*)(adapter.memory + block.offset) + (long)(start / 2 - block.first) * LANES + c % LANES;
        const float* from = b + (long)column.index * rank;
        for (int r = 0; r < rank; r += 2, to += LANES) *to = both(from[r] * scaling, r + 1 < rank ? from[r + 1] * scaling : 0.0f);
    }
}

// One linear's DoRA gains [d_out], by which the sums of base and update are multiplied, but not the bias.
inline void set_gain(Adapter& adapter, const Shape& s, int layer, int group, int member, const float* gain) {
    Site& site = adapter.sites[layer * GROUPS + group];
    if (site.gain.empty()) site.gain.assign(up_to(s.columns(group), PANEL), 1.0f);
    for (int c = 0; c < s.columns(group); c++) {
        Column column = s.column(group, c);
        if (column.member == member) site.gain[c] = gain[column.index];
    }
}

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
