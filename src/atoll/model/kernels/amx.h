// Panels by AMX: a 2 x 2 block of tiles is 32 rows by 32 columns, 32 k a step.
//
// A tile register holds 16 rows of 64 bytes. Rows beyond the batch are computed and thrown away. Without the processor (ATOLL_AMX_EMULATED) the four
// tile operations are plain loops, so that this file is tested wherever the tests run.
#pragma once

#include "simd.h"

namespace kernels {

constexpr int TILE = 16;

#if defined(ATOLL_AMX_EMULATED)

struct Tiles {
    uint32_t data[8][TILE][TILE];
};
inline Tiles& tiles() { thread_local Tiles t; return t; }
inline void amx_begin() {}
inline void amx_end() {}
template <int T> inline void tile_zero() { memset(tiles().data[T], 0, sizeof tiles().data[T]); }
template <int T> inline void tile_load(const void* p, long stride) {
    for (int r = 0; r < TILE; r++) memcpy(tiles().data[T][r], (const char*)p + r * stride, 64);
}
template <int T> inline void tile_store(void* p, long stride) {
    for (int r = 0; r < TILE; r++) memcpy((char*)p + r * stride, tiles().data[T][r], 64);
}
template <int C, int A, int B> inline void tile_product() {
    Tiles& t = tiles();
    for (int m = 0; m < TILE; m++)
        for (int k = 0; k < TILE; k++)
            for (int n = 0; n < TILE; n++) {
                float sum; memcpy(&sum, &t.data[C][m][n], 4);
                uint32_t a = t.data[A][m][k], b = t.data[B][k][n];
                sum += widen((bf16)a) * widen((bf16)b);
                sum += widen((bf16)(a >> 16)) * widen((bf16)(b >> 16));
                memcpy(&t.data[C][m][n], &sum, 4);
            }
}
inline bool amx_allowed() { return true; }

#else

}  // namespace kernels
#include <sys/syscall.h>
#include <unistd.h>
namespace kernels {

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Linux gives a process the tile registers only when it asks (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
inline bool amx_allowed() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

inline void amx_begin() {
    TileConfig config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) { config.row_bytes[i] = 64; config.rows[i] = TILE; }
    asm volatile("" ::"r"(&config) : "memory");  // some compilers drop the stores above otherwise
    _tile_loadconfig(&config);
}
inline void amx_end() { _tile_release(); }
// The intrinsics take the register's number as a literal.
#define ATOLL_EACH_TILE(T, DO) \
    switch (T) { case 0: DO(0); break; case 1: DO(1); break; case 2: DO(2); break; case 3: DO(3); break; \
                 case 4: DO(4); break; case 5: DO(5); break; case 6: DO(6); break; case 7: DO(7); break; }
template <int T> inline __attribute__((always_inline)) void tile_zero() {
#define DO(t) _tile_zero(t)
    ATOLL_EACH_TILE(T, DO)
#undef DO
}
template <int T> inline __attribute__((always_inline)) void tile_load(const void* p, long stride) {
#define DO(t) _tile_loadd(t, p, stride)
    ATOLL_EACH_TILE(T, DO)
#undef DO
}
template <int T> inline __attribute__((always_inline)) void tile_store(void* p, long stride) {
#define DO(t) _tile_stored(t, p, stride)
    ATOLL_EACH_TILE(T, DO)
#undef DO
}
// Sums stand in tiles 0 to 3, x in 4 and 5, weights in 6 and 7.
template <int C, int A, int B> inline __attribute__((always_inline)) void tile_product() {
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
    if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
    if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
}

#endif

template <bool TWO> inline void amx_block(const bf16* x, long x_stride, const bf16* w, int steps, const bf16* ahead) {
    const long pair_bytes = 128, x_bytes = x_stride * 2;
    tile_zero<0>();
    tile_zero<1>();
    if (TWO) { tile_zero<2>(); tile_zero<3>(); }
    for (int k = 0; k < steps; k++) {
        const bf16* tile = w + (long)k * TILE * 64;
        if (ahead)
            for (int line = 0; line < 32; line++) prefetch((const char*)ahead + k * 2048 + line * 64);
        tile_load<4>(x + k * 2 * TILE, x_bytes);
        tile_load<6>(tile, pair_bytes);
        tile_product<0, 4, 6>();
        tile_load<7>(tile + 2 * TILE, pair_bytes);
        tile_product<1, 4, 7>();
        if (TWO) {
            tile_load<5>(x + TILE * x_stride + k * 2 * TILE, x_bytes);
            tile_product<2, 5, 6>();
            tile_product<3, 5, 7>();
        }
    }
}

// out [rows][32] = x [rows][2 * pairs] times a panel. pairs is a multiple of 16.
inline void amx_product(int rows, float* out, long out_stride, const bf16* x, long x_stride, const bf16* w, int pairs, const bf16* ahead) {
    alignas(64) float block[2 * TILE][2 * TILE];
    for (int m = 0; m < rows; m += 2 * TILE) {
        bool two = rows - m > TILE;
        if (two) amx_block<true>(x + m * x_stride, x_stride, w, pairs / TILE, m == 0 ? ahead : nullptr);
        else amx_block<false>(x + m * x_stride, x_stride, w, pairs / TILE, m == 0 ? ahead : nullptr);
        tile_store<0>(block[0], 128);
        tile_store<1>(block[0] + TILE, 128);
        if (two) { tile_store<2>(block[TILE], 128); tile_store<3>(block[TILE] + TILE, 128); }
        for (int r = 0; r < 2 * TILE && m + r < rows; r++) memcpy(out + (m + r) * out_stride, block[r], 128);
    }
}

}  // namespace kernels
