// The sizes that everything else derives from: which column of a packed linear comes from where, and how a page is laid out.
#pragma once

#include <cstdlib>
#include <cstring>

#include "product.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kernels {

inline int up_to(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Where an output column of a packed linear comes from.
struct Column {
    int member = -1;  // of the group: 0 for q, 1 for k, ...; -1: padding
    int index = 0;
};

enum Group { QKV, OUT, GATE_UP, DOWN, GROUPS };
constexpr int PAGE = 32;       // tokens; a page's keys are one panel
constexpr int ROW_BLOCK = 48;  // rows whose sums stand in a thread's scratch at a time

struct Shape {
    int hidden, mlp, layers, heads, kv_heads, head_size, vocabulary;
    float norm_eps;
    int members() const { return heads + 2 * kv_heads; }
    int q_width() const { return heads * head_size; }
    int kv_width() const { return kv_heads * head_size; }
    int input(int group) const { return group == OUT ? q_width() : group == DOWN ? mlp : hidden; }
    int columns(int group) const {
        if (group == QKV) return up_to(q_width() + 2 * kv_width(), PANEL);
        if (group == GATE_UP) return up_to(mlp, LANES) * 2;  // 16 gates, 16 ups, 16 gates, ...
        return up_to(hidden, PANEL);
    }
    int num_members(int group) const { return group == QKV ? 3 : group == GATE_UP ? 2 : 1; }
    int member_width(int group, int member) const {
        if (group == QKV) return member == 0 ? q_width() : kv_width();
        return group == GATE_UP ? mlp : hidden;
    }
    Column column(int group, int packed) const {
        if (group == GATE_UP) {
            int index = packed / PANEL * LANES + packed % LANES;
            return index < mlp ? Column{packed % PANEL / LANES, index} : Column{};
        }
        for (int member = 0; member < num_members(group); member++) {
            int width = member_width(group, member);
            if (packed < width) return {member, packed};
            packed -= width;
        }
        return {};
    }
    // Page layout, in bfloat16 numbers.
    long keys_size() const { return (long)head_size * PAGE; }
    long head_stride() const { return keys_size() + (long)up_to(head_size, PANEL) * PAGE; }
    long layer_stride() const { return head_stride() * kv_heads; }
    long page_stride() const { return layer_stride() * layers; }
};

// Zeroed memory for free(), on huge pages where it is large; null when there is none.
inline void* zeroed(size_t bytes) {
    const size_t huge = 2 << 20;
    size_t alignment = bytes < huge ? 64 : huge;
    void* memory = nullptr;
    bytes = (bytes + alignment - 1) & ~(alignment - 1);
    if (posix_memalign(&memory, alignment, bytes)) return nullptr;
#if defined(__linux__)
    if (alignment == huge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memset(memory, 0, bytes);
}

}  // namespace kernels
