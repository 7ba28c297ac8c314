// LoRA's thin products over the segments of a batch, each with factors of its own: y += s (x Aᵀ) B, and the way back.
//
// A library's product of 180 tokens with 16 ranks spends as long on finding out what to do as on doing it, and a linear with three members needs
// twelve of them. Here one call does them all. Factors come in as float32 masters [rank][width] and are packed as bfloat16 pairs, as simd.h wants
// them: along the width where that is summed over, along the ranks where those are. Members stand side by side in lanes, each from a multiple of 16 on;
// lanes beyond its rank are zero. Sums are float32 and in one order for each result, whatever the number of threads.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "simd.h"

namespace kernels {

// One member of a fused linear: columns out_start to out_start + width of y. b [rank][width]; db the same, or null where nobody asks for it.
struct ThinPart {
    int rank, lane, lanes;
    long out_start, width;
    const float* b;
    float* db;
    float scaling;
    long packed;  // where its packed factors are, in elements of the scratch
};

// Tokens start to start + tokens of y. x [tokens][d_in]; a [ranks][d_in], the members' one below the other; z [tokens][lanes] = x Aᵀ.
// Backward: dx [tokens][d_in] is added to, da [ranks][d_in] is written; null where nobody asks for them.
struct ThinSegment {
    long start, tokens;
    int lanes;
    const float* a;
    const bf16* x;
    bf16 *z, *dx;
    float* da;
    std::vector<ThinPart> parts;
    long packed, dz, z_pairs, dz_pairs;  // in the scratch: A, and for backward dz [tokens][lanes], z and dz in pairs [tokens / 2][lanes][2]
    long even() const { return (tokens + 1) / 2 * 2; }
};

struct ThinTask { int segment, part; long begin, end; };

constexpr long THIN_TOKENS = 24;    // of a task; even, since its pairs of tokens must be its own
constexpr long THIN_PACKED = 256;   // columns of a factor that a task packs
constexpr long THIN_COLUMNS = 32;   // of a factor's gradient that are a task: their part of a row of x is a cache line
constexpr long THIN_ROWS = 12;      // of y that are added to from left to right before the next ones

// Sums of ROWS x VECS vectors over pairs: out(m, v, sum). x [ROWS][2 * pairs], w [pairs][...][2].
template <int ROWS, int VECS, class Out>
inline void thin_sums(const bf16* x, long x_stride, const bf16* w, long w_stride, long pairs, int row, Out out) {
    Vec sums[ROWS][VECS];
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) sums[m][v] = Vec{};
    for (long k = 0; k < pairs; k++) {
        Pairs at[VECS];
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) at[v] = load_pairs(w + k * w_stride + v * 2 * LANES);
#pragma GCC unroll 12
        for (int m = 0; m < ROWS; m++) {
            Pairs both = pair(x + m * x_stride + 2 * k);
#pragma GCC unroll 4
            for (int v = 0; v < VECS; v++) sums[m][v] = dot2(sums[m][v], at[v], both);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; m++)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; v++) out(row + m, v, sums[m][v]);
}

template <int ROWS, int VECS, class Out>
inline void thin_some(int rows, const bf16* x, long x_stride, const bf16* w, long w_stride, long pairs, int row, Out out) {
    if (rows == ROWS) thin_sums<ROWS, VECS>(x, x_stride, w, w_stride, pairs, row, out);
    else if constexpr (ROWS > 1) thin_some<ROWS - 1, VECS>(rows, x, x_stride, w, w_stride, pairs, row, out);
}

// The same for any number of rows, as many at a time as there are registers for.
template <int VECS, class Out> inline void thin_product(long rows, const bf16* x, long x_stride, const bf16* w, long w_stride, long pairs, Out out) {
#if defined(__AVX512F__)
    constexpr int MOST = VECS == 1 ? 12 : 24 / VECS;
#else
    constexpr int MOST = VECS == 4 ? 1 : 6 / VECS;
#endif
    const long blocks = (rows + MOST - 1) / MOST;
    for (long block = 0, row = 0; block < blocks; block++) {  // of like size: a few rows by themselves would wait for their sums
        long size = (rows - row + blocks - block - 1) / (blocks - block);
        thin_some<MOST, VECS>((int)size, x + row * x_stride, x_stride, w, w_stride, pairs, (int)row, out);
        row += size;
    }
}

// z [rows][lanes] = scale * x [rows][width] times factors packed along the width, [width / 2][lanes][2].
inline void thin_shrink(long rows, const bf16* x, long x_stride, long width, const bf16* w, int lanes, float scale, bf16* z, long z_stride) {
    for (int lane = 0; lane < lanes;) {
        auto out = [&](int m, int v, Vec sum) { store_narrow(z + m * z_stride + lane + v * LANES, sum * scale); };
        switch (std::min(3, (lanes - lane) / LANES)) {
            case 3: thin_product<3>(rows, x, x_stride, w + lane * 2, lanes * 2, width / 2, out); lane += 3 * LANES; break;
            case 2: thin_product<2>(rows, x, x_stride, w + lane * 2, lanes * 2, width / 2, out); lane += 2 * LANES; break;
            default: thin_product<1>(rows, x, x_stride, w + lane * 2, lanes * 2, width / 2, out); lane += LANES;
        }
    }
}

// y [rows][width] += scale * z [rows][lanes] times factors packed along the ranks, [lanes / 2][padded width][2].
inline void thin_expand(long rows, const bf16* z, long z_stride, int lanes, const bf16* w, long width, float scale, bf16* y, long y_stride) {
    const long padded = (width + LANES - 1) / LANES * LANES;
    for (long row = 0; row < rows; row += THIN_ROWS) {  // column by column within a few rows, so that y is read as it lies
        const long count = std::min(THIN_ROWS, rows - row);
        const bf16* x = z + row * z_stride;
        for (long column = 0; column < width;) {
            bf16* at = y + row * y_stride + column;
            const long left = width - column;
            for (long m = 0; m < count; m++) prefetch(at + m * y_stride + 4 * LANES), prefetch(at + m * y_stride + 6 * LANES);
            if (left >= 4 * LANES) {
                thin_product<4>(count, x, z_stride, w + column * 2, padded * 2, lanes / 2, [&](int m, int v, Vec sum) {
                    bf16* to = at + m * y_stride + v * LANES;
                    store_narrow(to, widen(to) + sum * scale);
                });
                column += 4 * LANES;
                continue;
            }
            thin_product<1>(count, x, z_stride, w + column * 2, padded * 2, lanes / 2, [&](int m, int, Vec sum) {
                bf16* to = at + m * y_stride;
                int n = (int)std::min((long)LANES, left);
                narrow_some(to, widen_some(to, n) + sum * scale, n);
            });
            column += LANES;
        }
    }
}

// Sums of ROWS vectors over pairs of tokens: out(row + m, sum). z [pairs][...][2], x [tokens][...], of which n columns.
template <int ROWS, class Out>
inline void outer_sums(const bf16* z, long z_stride, const bf16* x, long x_stride, long tokens, int n, int row, Out out) {
    Vec sums[ROWS];
#pragma GCC unroll 24
    for (int m = 0; m < ROWS; m++) sums[m] = Vec{};
    for (long t = 0; t < tokens; t += 2, z += z_stride) {
        const bf16* low = x + t * x_stride;
        prefetch(low + 12 * x_stride), prefetch(low + 13 * x_stride);
        Pairs both = (Pairs)widen_some(low, n) >> 16;
        if (t + 1 < tokens) both |= (Pairs)widen_some(low + x_stride, n);
#pragma GCC unroll 24
        for (int m = 0; m < ROWS; m++) sums[m] = dot2(sums[m], both, pair(z + 2 * m));
    }
#pragma GCC unroll 24
    for (int m = 0; m < ROWS; m++) out(row + m, sums[m]);
}

template <int ROWS, class Out>
inline void outer_some(int rows, const bf16* z, long z_stride, const bf16* x, long x_stride, long tokens, int n, int row, Out out) {
    if (rows == ROWS) outer_sums<ROWS>(z, z_stride, x, x_stride, tokens, n, row, out);
    else if constexpr (ROWS > 1) outer_some<ROWS - 1>(rows, z, z_stride, x, x_stride, tokens, n, row, out);
}

// out [rank][width], columns begin to end, = scale * sum over tokens of z[token][rank] x[token][column]; z in pairs of tokens, [tokens / 2][lanes][2].
inline void thin_outer(int rank, const bf16* z, int lanes, const bf16* x, long x_stride, long tokens, long begin, long end, long width, float scale,
                       float* out) {
#if defined(__AVX512F__)
    constexpr int MOST = 24;
#else
    constexpr int MOST = 6;
#endif
    const int blocks = (rank + MOST - 1) / MOST;
    for (long column = begin; column < end; column += LANES) {
        const int n = (int)std::min((long)LANES, end - column);
        auto write = [&](int m, Vec sum) { store_some(out + m * width + column, sum * scale, n); };
        for (int block = 0, row = 0; block < blocks; block++) {
            int size = (rank - row + blocks - block - 1) / (blocks - block);
            outer_some<MOST>(size, z + 2 * row, lanes * 2, x + column, x_stride, tokens, n, row, write);
            row += size;
        }
    }
}

// Columns begin to end of a factor [rank][width], packed along the width: to[width / 2][lanes][2], from lane `lane` on. The lanes beyond are zeroed.
inline void pack_width(const float* from, int rank, long width, long begin, long end, bf16* to, int lane, int member_lanes, int lanes) {
    for (int r = 0; r < member_lanes; r++)
        for (long k = begin; k < end; k += LANES) {
            alignas(64) bf16 some[LANES] = {};
            int n = (int)std::min((long)LANES, end - k);
            if (r < rank) narrow_some(some, load_some(from + r * width + k, n), n);
            for (int i = 0; i < n; i += 2) memcpy(to + ((k + i) / 2 * lanes + lane + r) * 2, some + i, 4);
        }
}

// The same along the ranks: to[lanes / 2][padded width][2], from row lane / 2 on.
inline void pack_ranks(const float* from, int rank, long width, long begin, long end, bf16* to, int lane, int member_lanes) {
    const long padded = (width + LANES - 1) / LANES * LANES;
    for (int r = 0; r < member_lanes; r += 2)
        for (long k = begin; k < end; k += LANES) {
            int n = (int)std::min((long)LANES, end - k);
            Halves low = r < rank ? narrow(load_some(from + r * width + k, n)) : Halves{};
            Halves high = r + 1 < rank ? narrow(load_some(from + (r + 1) * width + k, n)) : Halves{};
            Pairs both = __builtin_convertvector(low, Pairs) | __builtin_convertvector(high, Pairs) << 16;
            memcpy(to + ((lane + r) / 2 * padded + k) * 2, &both, 64);
        }
}

// The segments of one call, read from the numbers that thin.py writes: d_in, d_out, how many, and then of each start, tokens, a, x, z, dx, da,
// members, and of each of those rank, out_start, width, b, db. Room in a scratch is given out on the way.
struct ThinCall {
    long d_in, d_out;
    std::vector<ThinSegment> segments;
    std::vector<ThinTask> packing, blocks, panels;
    bf16* scratch;

    ThinCall(const int64_t* at, const float* scaling, bool backward) : d_in(at[0]), d_out(at[1]) {
        long room = LANES;
        auto take = [&](long elements) { long place = room; room += (elements + 31) / 32 * 32; return place; };
        auto padded = [](long width) { return (width + LANES - 1) / LANES * LANES; };
        const int64_t* next = at + 3;
        for (long count = 0; count < at[2]; count++) {
            ThinSegment s{};
            const int number = (int)count;
            s.start = next[0], s.tokens = next[1], s.a = (const float*)next[2], s.x = (const bf16*)next[3], s.z = (bf16*)next[4];
            s.dx = (bf16*)next[5], s.da = (float*)next[6];
            s.parts.resize(next[7]);
            next += 8;
            for (ThinPart& part : s.parts) {
                part = {(int)next[0], s.lanes, (int)padded(next[0]), (long)next[1], (long)next[2], (const float*)next[3], (float*)next[4], *scaling++, 0};
                part.packed = take(part.lanes * padded(part.width));
                s.lanes += part.lanes;
                next += 5;
            }
            s.packed = take(s.lanes * padded(d_in));
            if (backward) s.dz = take(s.tokens * s.lanes), s.z_pairs = take(s.even() * s.lanes), s.dz_pairs = take(s.even() * s.lanes);
            for (int part = -1; part < (int)s.parts.size(); part++) {
                long width = part < 0 ? d_in : s.parts[part].width;
                for (long k = 0; k < width; k += THIN_PACKED) packing.push_back({number, part, k, std::min(width, k + THIN_PACKED)});
                if (part < 0 ? s.da != nullptr : s.parts[part].db != nullptr)
                    for (long k = 0; k < width; k += THIN_COLUMNS) panels.push_back({number, part, k, std::min(width, k + THIN_COLUMNS)});
            }
            for (long t = 0; t < s.tokens; t += THIN_TOKENS) blocks.push_back({number, 0, t, std::min(s.tokens, t + THIN_TOKENS)});
            segments.push_back(std::move(s));
        }
        static thread_local std::unique_ptr<bf16, decltype(&std::free)> kept{nullptr, &std::free};
        static thread_local long kept_room = 0;
        if (room > kept_room) {
            kept.reset();  // before the larger one is taken
            kept.reset(static_cast<bf16*>(std::aligned_alloc(64, (room + 31) / 32 * 32 * sizeof(bf16))));
            kept_room = kept ? room : 0;
        }
        scratch = kept.get();
    }

    // A along the width and B along the ranks, as the forward needs them, or the other way round.
    void pack(const ThinTask& task, bool backward) {
        ThinSegment& s = segments[task.segment];
        if (task.part >= 0) {
            ThinPart& part = s.parts[task.part];
            bf16* to = scratch + part.packed;
            if (backward) pack_width(part.b, part.rank, part.width, task.begin, task.end, to, 0, part.lanes, part.lanes);
            else pack_ranks(part.b, part.rank, part.width, task.begin, task.end, to, 0, part.lanes);
            return;
        }
        const float* a = s.a;
        for (ThinPart& part : s.parts) {
            if (backward) pack_ranks(a, part.rank, d_in, task.begin, task.end, scratch + s.packed, part.lane, part.lanes);
            else pack_width(a, part.rank, d_in, task.begin, task.end, scratch + s.packed, part.lane, part.lanes, s.lanes);
            a += part.rank * d_in;
        }
    }

    void forward(const ThinTask& task, bf16* y) {
        ThinSegment& s = segments[task.segment];
        long rows = task.end - task.begin;
        bf16 *z = s.z + task.begin * s.lanes, *to = y + (s.start + task.begin) * d_out;
        thin_shrink(rows, s.x + task.begin * d_in, d_in, d_in, scratch + s.packed, s.lanes, 1, z, s.lanes);
        for (ThinPart& part : s.parts)
            thin_expand(rows, z + part.lane, s.lanes, part.lanes, scratch + part.packed, part.width, part.scaling, to + part.out_start, d_out);
    }

    void backward(const ThinTask& task, const bf16* dy) {
        ThinSegment& s = segments[task.segment];
        long rows = task.end - task.begin;
        bf16* dz = scratch + s.dz + task.begin * s.lanes;
        const bf16* from = dy + (s.start + task.begin) * d_out;
        for (ThinPart& part : s.parts)
            thin_shrink(rows, from + part.out_start, d_out, part.width, scratch + part.packed, part.lanes, part.scaling, dz + part.lane, s.lanes);
        if (s.dx) thin_expand(rows, dz, s.lanes, s.lanes, scratch + s.packed, d_in, 1, s.dx + task.begin * d_in, d_in);
        using Rows = std::pair<const bf16*, long>;
        for (auto [of_rows, pairs] : {Rows{s.z + task.begin * s.lanes, s.z_pairs}, Rows{dz, s.dz_pairs}})
            for (long t = 0; t < rows; t += 2)
                for (int lane = 0; lane < s.lanes; lane += LANES) {
                    Pairs both = (Pairs)widen(of_rows + t * s.lanes + lane) >> 16;
                    if (t + 1 < rows) both |= (Pairs)widen(of_rows + (t + 1) * s.lanes + lane);
                    memcpy(scratch + pairs + (task.begin + t) * s.lanes + 2 * lane, &both, 64);
                }
    }

    void gradients(const ThinTask& task, const bf16* dy) {
        ThinSegment& s = segments[task.segment];
        if (task.part >= 0) {
            ThinPart& part = s.parts[task.part];
            const bf16 *z = scratch + s.z_pairs + 2 * part.lane, *from = dy + s.start * d_out + part.out_start;
            thin_outer(part.rank, z, s.lanes, from, d_out, s.tokens, task.begin, task.end, part.width, part.scaling, part.db);
            return;
        }
        float* da = s.da;
        for (size_t first = 0, next; first < s.parts.size(); first = next) {  // members without lanes between them go together
            int rank = s.parts[first].rank;
            for (next = first + 1; next < s.parts.size() && s.parts[next].lane == s.parts[first].lane + rank; next++) rank += s.parts[next].rank;
            thin_outer(rank, scratch + s.dz_pairs + 2 * s.parts[first].lane, s.lanes, s.x, d_in, s.tokens, task.begin, task.end, d_in, 1, da);
            da += rank * d_in;
        }
    }
};

}  // namespace kernels
