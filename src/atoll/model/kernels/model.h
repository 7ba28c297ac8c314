// A base as the forward reads it: its sizes, its linears packed into panels, and the memory that forwards share.
#pragma once

#include <memory>
#include <mutex>
#include <new>

#include "product.h"
#include "shape.h"
#include "threads.h"

namespace kernels {

struct Linear {
    std::unique_ptr<bf16, decltype(&free)> weights{nullptr, free};
    std::vector<float> bias;  // packed order; empty: none
    int panels = 0, pairs = 0;

    // weight [rows][k] row major, row i of it becoming the packed column whose source it is.
    template <class RowOf> void pack(const bf16* weight, int k, int columns, RowOf row_of) {
        panels = columns / PANEL;
        pairs = up_to(k, PANEL) / 2;
        weights.reset((bf16*)zeroed((size_t)columns * pairs * 4));
        if (!weights) throw std::bad_alloc();
        for (int c = 0; c < columns; c++) {
            long row = row_of(c);
            if (row < 0) continue;
            bf16* to = weights.get() + (long)(c / PANEL) * pairs * PAIR_STRIDE + c % PANEL * 2;
            for (int i = 0; i < k; i++) to[(long)(i / 2) * PAIR_STRIDE + i % 2] = weight[row * k + i];
        }
    }
    // One of a block's four fused linears.
    void pack(const Shape& s, int group, const bf16* weight, const float* own_bias) {
        auto row_of = [&](int packed) -> long {
            Column column = s.column(group, packed);
            if (column.member < 0) return -1;
            long before = 0;
            for (int member = 0; member < column.member; member++) before += s.member_width(group, member);
            return before + column.index;
        };
        pack(weight, s.input(group), s.columns(group), row_of);
        if (!own_bias) return;
        bias.assign(s.columns(group), 0.0f);
        for (int c = 0; c < s.columns(group); c++)
            if (row_of(c) >= 0) bias[c] = own_bias[row_of(c)];
    }
    const bf16* panel(int p) const { return weights.get() + (long)p * pairs * PAIR_STRIDE; }
    // The panel after p, while its first rows are at work.
    const bf16* ahead(int p, int first_row) const { return first_row == 0 && p + 1 < panels ? panel(p + 1) : nullptr; }
    long panel_bytes() const { return (long)pairs * PAIR_STRIDE * 2; }
};

struct Layer {
    Linear linears[GROUPS];
    std::vector<float> input_norm, post_norm, q_norm, k_norm;
    int window = 0;  // 0: full attention
};

struct Model {
    Shape shape;
    std::vector<Layer> layers;
    Linear head;
    std::vector<float> final_norm;
    const bf16* embedding = nullptr;  // [V][D], the caller's
    std::unique_ptr<Threads> threads;
    std::mutex busy;
    char* scratch = nullptr;
    size_t scratch_size = 0;
    ~Model() { free(scratch); }

    Threads& team_of(int size) {
        if (!threads || threads->size() != size || !threads->alive()) threads = std::make_unique<Threads>(size);
        return *threads;
    }
    char* reserve(size_t bytes) {
        if (bytes > scratch_size) {
            free(scratch);
            scratch_size = 0;
            scratch = (char*)zeroed(bytes);
            if (!scratch) throw std::bad_alloc();
            scratch_size = bytes;
        }
        return scratch;
    }
};

// Hands out parts of the scratch memory; the first pass only counts.
struct Arena {
    char* base;
    size_t used = 0;
    template <class T> T* take(size_t count) {
        T* place = base ? (T*)(base + used) : nullptr;
        used += (count * sizeof(T) + 127) / 128 * 128;
        return place;
    }
};

}  // namespace kernels
