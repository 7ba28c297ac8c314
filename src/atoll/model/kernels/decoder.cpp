// The forward of a Llama-like decoder over a packed batch, as one call: prefill, chunks of a prompt, decode, or all at once.
//
// It computes what model/decoder.py computes: residual stream and sums in float32, inputs of products rounded to bfloat16. The caller gives tokens, page
// tables, angles and each row's adapter; the threads go through the layers together, phase by phase (threads.h). A row's numbers never depend on the
// other rows, on the number of threads, or on how its prompt was cut: they are bitwise the same.
//
// Keys and values live in pages of 32 tokens, packed as panels: keys [K / 2][32 tokens][2], values [K / 32][16 token pairs][32][2], for each page, layer
// and key head. C ABI, called through ctypes by decoder.py of this folder.

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

#include "adapter.h"
#include "product.h"
#include "sampling.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kernels {

enum Group { QKV, OUT, GATE_UP, DOWN, GROUPS };
constexpr int PAGE = 32;       // tokens; a page's keys are one panel
constexpr int ROW_BLOCK = 48;  // rows whose sums stand in a thread's scratch at a time
constexpr int CHUNK_BYTES = 256 << 10;  // of weights that a task keeps in its cache while rows pass by
constexpr int QUERIES = 12;    // of one key head that go through its pages together

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

void* aligned(size_t bytes) {
    const size_t huge = 2 << 20;
    void* memory = nullptr;
    bytes = (bytes + huge - 1) & ~(huge - 1);
    if (posix_memalign(&memory, huge, bytes)) return nullptr;
#if defined(__linux__)
    madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return memory;
}

struct Linear {
    std::unique_ptr<bf16, decltype(&free)> weights{nullptr, free};
    std::vector<float> bias;  // packed order; empty: none
    int panels = 0, pairs = 0;

    // weight [rows][k] row major, row i of it becoming the packed column whose source it is.
    template <class RowOf> void pack(const bf16* weight, int k, int columns, RowOf row_of) {
        panels = columns / PANEL;
        pairs = up_to(k, PANEL) / 2;
        weights.reset((bf16*)aligned((size_t)columns * pairs * 4));
        memset(weights.get(), 0, (size_t)columns * pairs * 4);
        for (int c = 0; c < columns; c++) {
            long row = row_of(c);
            if (row < 0) continue;
            bf16* to = weights.get() + (long)(c / PANEL) * pairs * PAIR_STRIDE + c % PANEL * 2;
            for (int i = 0; i < k; i++) to[(long)(i / 2) * PAIR_STRIDE + i % 2] = weight[row * k + i];
        }
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

// What one call works on. Lengths in comments; D hidden size, K head size.
struct Batch {
    int num_rows, num_tokens, num_outputs, max_pages;
    const int32_t* token_ids;    // [T]
    const int32_t* row_starts;   // [rows + 1]
    const int32_t* context;      // [rows]
    const int32_t* pages;        // [rows][max_pages]
    const float* cos;            // [T][K / 2]
    const float* sin;            // [T][K / 2]
    const int32_t* outputs;      // [num_outputs] tokens whose hidden states are wanted
    Adapter* const* adapters;    // [rows], null where a row uses the base alone
    bf16* cache;                 // the pages
    bf16* hidden;                // [num_outputs][D], written
};

struct Model {
    Shape shape;
    std::vector<Layer> layers;
    Linear head;
    std::vector<float> final_norm;
    const bf16* embedding = nullptr;  // [V][D], the caller's
    std::unique_ptr<Threads> threads;
    std::vector<Drawer> drawers;
    std::mutex busy;
    char* scratch = nullptr;
    size_t scratch_size = 0;
    ~Model() { free(scratch); }

    Threads& team_of(int size) {
        if (!threads || threads->size() != size) threads = std::make_unique<Threads>(size);
        return *threads;
    }
    char* reserve(size_t bytes) {
        if (bytes > scratch_size) {
            free(scratch);
            scratch = (char*)aligned(bytes);
            scratch_size = scratch ? bytes : 0;
            if (scratch) memset(scratch, 0, bytes);
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

void rms_norm(const float* x, const float* weight, int width, float eps, bf16* out, int padded) {
    Vec squares{};
    int i = 0;
    for (; i + LANES <= width; i += LANES) { Vec v = load(x + i); squares += v * v; }
    float total = sum_lanes(squares);
    for (int j = i; j < width; j++) total += x[j] * x[j];
    float scale = 1.0f / std::sqrt(total / width + eps);
    for (i = 0; i + LANES <= width; i += LANES) store_narrow(out + i, load(x + i) * scale * load(weight + i));
    for (; i < width; i++) { Halves h = narrow(all(x[i] * scale * weight[i])); out[i] = h[0]; }
    for (; i < padded; i++) out[i] = 0;
}

// The whole state of one forward. Every phase is a method that all threads enter.
struct Forward {
    Model& model;
    const Shape& s;
    const Batch& batch;
    Team* team = nullptr;

    struct Rows { int start, count; Adapter* adapter; };  // neighbouring tokens with one adapter, at most four
    struct Queries { int row, kv_head, first, count; };   // queries (token, head of the group) of one key head
    std::vector<Rows> groups;
    std::vector<Queries> queries;
    std::vector<Adapter*> adapter_of;
    std::vector<int> row_of;
    bool any_adapter = false;
    int z_stride = 0, most_keys = 0;

    float *residual, *qkv;
    bf16 *x, *q, *attended, *gated, *z;
    int x_stride, attended_stride, gated_stride, qkv_stride;
    std::vector<char*> own;  // each thread's scratch
    size_t own_size;

    Forward(Model& m, const Batch& b) : model(m), s(m.shape), batch(b) {
        int shared = s.heads / s.kv_heads;
        for (int row = 0; row < b.num_rows; row++) {
            int start = b.row_starts[row], stop = b.row_starts[row + 1];
            Adapter* adapter = b.adapters ? b.adapters[row] : nullptr;
            if (adapter) { any_adapter = true; z_stride = std::max(z_stride, adapter->widest); }
            for (int t = start; t < stop; t++) { adapter_of.push_back(adapter); row_of.push_back(row); }
            for (int t = start; t < stop; t += 4) groups.push_back({t, std::min(4, stop - t), adapter});
            most_keys = std::max(most_keys, up_to(b.context[row] + stop - start, PAGE));
        }
        // Long rows' late queries have the most to read: they go first, so that no thread is left with them at the end.
        for (int row = 0; row < b.num_rows; row++) {
            int total = (b.row_starts[row + 1] - b.row_starts[row]) * shared, step = QUERIES / shared > 0 ? QUERIES / shared * shared : QUERIES;
            for (int first = (total - 1) / step * step; first >= 0; first -= step)
                for (int head = 0; head < s.kv_heads; head++) queries.push_back({row, head, first, std::min(step, total - first)});
        }
    }

    // The scratch memory, laid out. Strides are padded to whole panels; what producers do not write there must be zero.
    size_t lay_out(char* base, int num_threads) {
        Arena arena{base};
        int tokens = up_to(batch.num_tokens, 16) + 16;
        x_stride = up_to(s.hidden, PANEL);
        attended_stride = up_to(s.q_width(), PANEL);
        gated_stride = up_to(s.columns(GATE_UP) / 2, PANEL);
        qkv_stride = s.columns(QKV);
        residual = arena.take<float>((size_t)tokens * x_stride);
        qkv = arena.take<float>((size_t)tokens * qkv_stride);
        x = arena.take<bf16>((size_t)tokens * x_stride);
        q = arena.take<bf16>((size_t)tokens * s.q_width() + LANES);
        attended = arena.take<bf16>((size_t)tokens * attended_stride);
        gated = arena.take<bf16>((size_t)tokens * gated_stride);
        z = arena.take<bf16>((size_t)tokens * z_stride + 2 * LANES);
        int width = up_to(s.head_size, PANEL);
        own_size = std::max((size_t)ROW_BLOCK * 16 * PANEL * 4, (size_t)QUERIES * (width * 2 + width * 4 + (size_t)most_keys * 6)) + 4096;
        own.resize(num_threads);
        for (char*& part : own) part = arena.take<char>(own_size);
        return arena.used;
    }

    void zero_paddings() {
        if (attended_stride > s.q_width()) memset(attended, 0, (size_t)batch.num_tokens * attended_stride * 2);
        if (gated_stride > s.columns(GATE_UP) / 2) memset(gated, 0, (size_t)batch.num_tokens * gated_stride * 2);
    }

    char* mine() { return own[Team::thread_index()]; }

    void embed() {
        team->share((batch.num_tokens + 15) / 16, [&](int task) {
            for (int t = task * 16; t < std::min(batch.num_tokens, task * 16 + 16); t++) {
                const bf16* from = model.embedding + (long)batch.token_ids[t] * s.hidden;
                float* to = residual + (long)t * x_stride;
                for (int i = 0; i < s.hidden; i++) to[i] = widen(from[i]);
            }
        });
    }

    const Site* site_of(Adapter* adapter, int layer, int group) const {
        const Site* site = &adapter->sites[layer * GROUPS + group];
        return site->rank ? site : nullptr;
    }

    void shrink_rows(const Rows& rows, int layer, int group, const bf16* input, int stride) {
        if (!rows.adapter) return;
        if (const Site* site = site_of(rows.adapter, layer, group))
            shrink(rows.count, input + (long)rows.start * stride, stride, rows.adapter->memory + site->a, site->rank, up_to(s.input(group), PANEL) / 2,
                   z + (long)rows.start * z_stride, z_stride);
    }

    // x = norm of the residual, and z for the linear that reads it.
    void norm_and_shrink(int layer, int group, const std::vector<float>& weight) {
        int step = batch.num_tokens > 256 ? 8 : 1;
        team->share(((int)groups.size() + step - 1) / step, [&](int task) {
            for (int g = task * step; g < std::min((int)groups.size(), task * step + step); g++) {
                const Rows& rows = groups[g];
                for (int t = rows.start; t < rows.start + rows.count; t++)
                    rms_norm(residual + (long)t * x_stride, weight.data(), s.hidden, s.norm_eps, x + (long)t * x_stride, x_stride);
                shrink_rows(rows, layer, group, x, x_stride);
            }
        });
    }

    void shrink_all(int layer, int group, const bf16* input, int stride) {
        if (!any_adapter) return;
        int step = batch.num_tokens > 256 ? 8 : 1;
        team->share(((int)groups.size() + step - 1) / step, [&](int task) {
            for (int g = task * step; g < std::min((int)groups.size(), task * step + step); g++) shrink_rows(groups[g], layer, group, input, stride);
        });
    }

    // One fused linear with every row's update. finish(token, first packed column, sums, count of columns) takes each row's sums.
    template <class Finish> void linear(int layer, int group, const bf16* input, int stride, Finish finish) {
        const Linear& w = model.layers[layer].linears[group];
        each_panel_chunk(w, batch.num_tokens, [&](int from, int to, int first, int count, float* sums, long width) {
            for (int p = from; p < to; p++)
                long_product(count, sums + (p - from) * PANEL, width, input + (long)first * stride, stride, w.panel(p), w.pairs, w.ahead(p, first));
            for (int t = first; t < first + count; t++) {
                float* row = sums + (long)(t - first) * width;
                if (Adapter* adapter = adapter_of[t])
                    if (const Site* site = site_of(adapter, layer, group))
                        expand(row, site->blocks.data(), from * 2, to * 2, adapter->memory, z + (long)t * z_stride,
                               t + 1 < first + count ? factors_of(t + 1, t, layer, group, from * 2) : nullptr);
                if (!w.bias.empty())
                    for (int i = 0; i < (to - from) * PANEL; i += LANES) store(row + i, load(row + i) + load(&w.bias[from * PANEL + i]));
                finish(t, from * PANEL, row, (to - from) * PANEL);
            }
        });
    }

    // Where another adapter's B begins for a 16-column block, if token t has one and it is not the one before's.
    const bf16* factors_of(int t, int before, int layer, int group, int block) const {
        Adapter* adapter = adapter_of[t];
        if (!adapter || adapter == adapter_of[before]) return nullptr;
        const Site* site = site_of(adapter, layer, group);
        return site ? adapter->memory + site->blocks[block].offset : nullptr;
    }

    // Shares a linear's panels: a task keeps a few of them in its cache and takes the rows past them, a block at a time.
    template <class Work> void each_panel_chunk(const Linear& w, int num_rows, Work work) {
        int most = (int)std::max(1L, std::min(16L, CHUNK_BYTES / w.panel_bytes()));
        int chunk = std::max(1, std::min(most, w.panels / (4 * team->size())));
        int chunks = (w.panels + chunk - 1) / chunk;
        team->share(chunks, [&](int task) {
            int from = task * chunk, to = std::min(w.panels, from + chunk);
            for (int first = 0; first < num_rows; first += ROW_BLOCK)
                work(from, to, first, std::min(ROW_BLOCK, num_rows - first), (float*)mine(), (long)chunk * PANEL);
        });
    }

    void rotate_and_store(int layer) {
        const Layer& weights = model.layers[layer];
        int step = batch.num_tokens > 256 ? 16 : 2, half = s.head_size / 2;
        team->share((batch.num_tokens + step - 1) / step, [&](int task) {
            for (int t = task * step; t < std::min(batch.num_tokens, task * step + step); t++) {
                float* heads = qkv + (long)t * qkv_stride;
                const float *cos = batch.cos + (long)t * half, *sin = batch.sin + (long)t * half;
                int row = row_of[t], position = batch.context[row] + t - batch.row_starts[row];
                bf16* page = batch.cache + batch.pages[(long)row * batch.max_pages + position / PAGE] * s.page_stride() + layer * s.layer_stride();
                int place = position % PAGE;
                for (int h = 0; h < s.heads + s.kv_heads; h++) {
                    bool is_key = h >= s.heads;
                    float* head = heads + h * s.head_size;
                    const std::vector<float>& norm = is_key ? weights.k_norm : weights.q_norm;
                    if (!norm.empty()) norm_head(head, norm.data());
                    rotate(head, cos, sin, half);
                    if (is_key) store_key(page + (h - s.heads) * s.head_stride(), place, head);
                    else narrow_all(head, q + (long)t * s.q_width() + h * s.head_size, s.head_size);
                }
                for (int h = 0; h < s.kv_heads; h++)
                    store_value(page + h * s.head_stride() + s.keys_size(), place, heads + (s.heads + s.kv_heads + h) * s.head_size);
            }
        });
    }

    void norm_head(float* head, const float* weight) {
        float total = 0;
        for (int i = 0; i < s.head_size; i++) total += head[i] * head[i];
        float scale = 1.0f / std::sqrt(total / s.head_size + s.norm_eps);
        for (int i = 0; i < s.head_size; i++) head[i] *= scale * weight[i];
    }

    static void rotate(float* head, const float* cos, const float* sin, int half) {
        for (int i = 0; i < half; i++) {
            float a = head[i], b = head[half + i];
            head[i] = a * cos[i] - b * sin[i];
            head[half + i] = b * cos[i] + a * sin[i];
        }
    }

    static void narrow_all(const float* from, bf16* to, int count) {
        int i = 0;
        for (; i + LANES <= count; i += LANES) store_narrow(to + i, load(from + i));
        for (; i < count; i++) { Halves h = narrow(all(from[i])); to[i] = h[0]; }
    }

    void store_key(bf16* keys, int place, const float* head) {
        bf16 rounded[1024];
        narrow_all(head, rounded, s.head_size);
        for (int i = 0; i < s.head_size; i += 2) memcpy(keys + (long)i / 2 * PAIR_STRIDE + place * 2, rounded + i, 4);
    }

    void store_value(bf16* values, int place, const float* head) {
        bf16 rounded[1024];
        narrow_all(head, rounded, s.head_size);
        for (int i = 0; i < s.head_size; i++) values[(long)(i / PANEL) * PAGE * PANEL + place / 2 * PAIR_STRIDE + i % PANEL * 2 + place % 2] = rounded[i];
    }

    void attend(int layer) {
        int window = model.layers[layer].window;
        team->share((int)queries.size(), [&](int task) { attend_one(layer, queries[task], window); });
    }

    // Up to twelve queries of one key head: all scores, softmax, then the weighted sum, page by page.
    void attend_one(int layer, const Queries& at, int window) {
        int shared = s.heads / s.kv_heads, width = up_to(s.head_size, PANEL);
        int start = batch.row_starts[at.row], context = batch.context[at.row];
        int last_key = context + (at.first + at.count - 1) / shared;  // what the last query sees
        int first_page = window ? std::max(0, context + at.first / shared - window + 1) / PAGE : 0;
        int num_pages = last_key / PAGE + 1 - first_page, keys = num_pages * PAGE;
        const int32_t* table = batch.pages + (long)at.row * batch.max_pages + first_page;
        long offset = layer * s.layer_stride() + at.kv_head * s.head_stride();

        Arena arena{mine()};
        bf16* query = arena.take<bf16>((size_t)QUERIES * width);
        float* scores = arena.take<float>((size_t)at.count * keys);
        bf16* weights = arena.take<bf16>((size_t)at.count * keys);
        float* sums = arena.take<float>((size_t)QUERIES * width);

        for (int i = 0; i < at.count; i++) {
            int token = start + (at.first + i) / shared, head = at.kv_head * shared + (at.first + i) % shared;
            memcpy(query + i * width, q + (long)token * s.q_width() + head * s.head_size, s.head_size * 2);
        }
        for (int j = 0; j < num_pages; j++) {
            const bf16* page = batch.cache + table[j] * s.page_stride() + offset;
            const bf16* next = j + 1 < num_pages ? batch.cache + table[j + 1] * s.page_stride() + offset : batch.cache + table[0] * s.page_stride() + offset + s.keys_size();
            product(at.count, scores + j * PAGE, keys, query, width, page, s.head_size / 2, false, next);
        }
        float inverse[QUERIES];
        for (int i = 0; i < at.count; i++) {
            int position = context + (at.first + i) / shared, base = first_page * PAGE;
            int from = window ? std::max(0, position - window + 1) - base : 0;
            inverse[i] = softmax(scores + (long)i * keys, weights + (long)i * keys, from, position + 1 - base, keys);
        }
        memset(sums, 0, (size_t)at.count * width * 4);
        for (int j = 0; j < num_pages; j++) {
            const bf16* values = batch.cache + table[j] * s.page_stride() + offset + s.keys_size();
            const bf16* next = j + 1 < num_pages ? batch.cache + table[j + 1] * s.page_stride() + offset + s.keys_size() : values;
            for (int d = 0; d < width; d += PANEL)
                product(at.count, sums + d, width, weights + j * PAGE, keys, values + (long)d * PAGE, PAGE / 2, true, next + (long)d * PAGE);
        }
        for (int i = 0; i < at.count; i++) {
            int token = start + (at.first + i) / shared, head = at.kv_head * shared + (at.first + i) % shared;
            float* row = sums + (long)i * width;
            for (int d = 0; d < s.head_size; d++) row[d] *= inverse[i];
            narrow_all(row, attended + (long)token * attended_stride + head * s.head_size, s.head_size);
        }
    }

    // weights = exp((score - largest) / sqrt(K)) for keys from <= k < to, 0 elsewhere; returns one over their sum.
    float softmax(const float* scores, bf16* weights, int from, int to, int keys) {
        Ints lane;
        for (int i = 0; i < LANES; i++) lane[i] = i;
        Vec largest = all(-std::numeric_limits<float>::infinity());
        const Vec lowest = largest;
        for (int j = 0; j < keys; j += LANES) {
            Ints place = lane + j, seen = (place >= from) & (place < to);
            largest = max(seen ? load(scores + j) : lowest, largest);
        }
        Vec top = all(max_lanes(largest)), total{};
        float scale = 1.0f / std::sqrt((float)s.head_size);
        for (int j = 0; j < keys; j += LANES) {
            Ints place = lane + j, seen = (place >= from) & (place < to);
            Vec weight = seen ? exp((load(scores + j) - top) * scale) : Vec{};
            total += weight;
            store_narrow(weights + j, weight);
        }
        return 1.0f / sum_lanes(total);
    }

    void layer(int index) {
        const Layer& weights = model.layers[index];
        auto add = [&](int t, int column, const float* sums, int count) {
            float* row = residual + (long)t * x_stride + column;
            for (int i = 0; i < count; i += LANES) store(row + i, load(row + i) + load(sums + i));
        };
        norm_and_shrink(index, QKV, weights.input_norm);
        linear(index, QKV, x, x_stride, [&](int t, int column, const float* sums, int count) { memcpy(qkv + (long)t * qkv_stride + column, sums, count * 4); });
        rotate_and_store(index);
        attend(index);
        shrink_all(index, OUT, attended, attended_stride);
        linear(index, OUT, attended, attended_stride, add);
        norm_and_shrink(index, GATE_UP, weights.post_norm);
        linear(index, GATE_UP, x, x_stride, [&](int t, int column, const float* sums, int count) {
            bf16* row = gated + (long)t * gated_stride + column / 2;
            for (int i = 0; i < count; i += PANEL) {
                Vec gate = load(sums + i), up = load(sums + i + LANES);
                store_narrow(row + i / 2, gate / (1.0f + exp(-gate)) * up);
            }
        });
        shrink_all(index, DOWN, gated, gated_stride);
        linear(index, DOWN, gated, gated_stride, add);
    }

    void outputs() {
        team->share(batch.num_outputs, [&](int n) {
            rms_norm(residual + (long)batch.outputs[n] * x_stride, model.final_norm.data(), s.hidden, s.norm_eps, batch.hidden + (long)n * s.hidden, s.hidden);
        });
    }

    void operator()(Team& shared) {
        if (Team::thread_index() == 0) team = &shared;
        shared.share(1, [&](int) { zero_paddings(); });
#if defined(ATOLL_AMX)
        amx_begin();
#endif
        embed();
        for (int index = 0; index < s.layers; index++) layer(index);
        outputs();
#if defined(ATOLL_AMX)
        amx_end();
#endif
    }
};

// hidden [rows][D] through the head: all logits, or the best token of each row.
struct Head {
    Model& model;
    int num_rows, stride;
    const bf16* x;
    float* logits;  // [rows][V], or null
    float* best;    // [rows], or null; NaN where a logit is not a number
    int32_t* token;
    std::vector<char*> own;
    std::vector<std::vector<float>> values;
    std::vector<std::vector<int32_t>> tokens;

    void operator()(Team& team) {
#if defined(ATOLL_AMX)
        amx_begin();
#endif
        const Linear& w = model.head;
        int me = Team::thread_index(), vocabulary = model.shape.vocabulary, chunk = 4, chunks = (w.panels + chunk - 1) / chunk;
        values[me].assign(num_rows, -std::numeric_limits<float>::infinity());
        tokens[me].assign(num_rows, std::numeric_limits<int32_t>::max());
        team.share(chunks, [&](int task) {
            int from = task * chunk, to = std::min(w.panels, from + chunk), columns = std::min(vocabulary, to * PANEL) - from * PANEL;
            float* sums = (float*)own[me];
            for (int first = 0; first < num_rows; first += ROW_BLOCK) {
                int count = std::min(ROW_BLOCK, num_rows - first);
                for (int p = from; p < to; p++)
                    long_product(count, sums + (p - from) * PANEL, chunk * PANEL, x + (long)first * stride, stride, w.panel(p), w.pairs, w.ahead(p, first));
                for (int m = first; m < first + count; m++) {
                    const float* row = sums + (long)(m - first) * chunk * PANEL;
                    if (logits) memcpy(logits + (long)m * vocabulary + from * PANEL, row, columns * 4);
                    else keep_best(me, m, row, from * PANEL, columns);
                }
            }
        });
#if defined(ATOLL_AMX)
        amx_end();
#endif
    }

    // The largest value, the first token of equal ones; a NaN wins over everything.
    void keep_best(int me, int m, const float* row, int column, int count) {
        Vec top = all(-std::numeric_limits<float>::infinity());
        Ints strange{};
        int i = 0;
        for (; i + LANES <= count; i += LANES) { Vec v = load(row + i); top = max(v, top); strange |= v != v; }
        float most = max_lanes(top);
        for (int j = i; j < count; j++) { most = row[j] > most ? row[j] : most; strange[0] |= row[j] != row[j] ? -1 : 0; }
        for (int lane = 0; lane < LANES; lane++)
            if (strange[lane]) values[me][m] = std::numeric_limits<float>::quiet_NaN();
        if (!(most >= values[me][m])) return;
        int place = 0;
        while (place < count && row[place] != most) place++;
        if (place == count || (most == values[me][m] && column + place > tokens[me][m])) return;
        values[me][m] = most;
        tokens[me][m] = column + place;
    }

    void merge() {
        for (int m = 0; m < num_rows; m++) {
            float value = values[0][m];
            int32_t at = tokens[0][m];
            for (size_t i = 1; i < values.size(); i++) {
                float other = values[i][m];
                if (other != other || other > value || (other == value && tokens[i][m] < at)) { value = other; at = tokens[i][m]; }
                if (value != value) break;
            }
            best[m] = value;
            token[m] = at == std::numeric_limits<int32_t>::max() ? 0 : at;
        }
    }
};

}  // namespace kernels

using namespace kernels;

extern "C" {

// What this library was built for, so that a stale file is never used: changes with the functions below.
int atoll_interface() { return 2; }

int atoll_usable() {
#if defined(ATOLL_AMX)
    return amx_allowed();
#else
    return 1;
#endif
}

// shape: hidden, mlp, layers, heads, kv_heads, head_size, vocabulary. embedding and head [V][D] bfloat16; the embedding must outlive the model.
Model* atoll_model(const int32_t* shape, float norm_eps, const bf16* embedding, const bf16* head, const float* final_norm) {
    Model* model = new Model();
    model->shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], norm_eps};
    model->layers.resize(shape[2]);
    model->embedding = embedding;
    int vocabulary = shape[6];
    model->head.pack(head, shape[0], up_to(vocabulary, PANEL), [&](int c) { return c < vocabulary ? c : -1; });
    model->final_norm.assign(final_norm, final_norm + shape[0]);
    return model;
}

void atoll_model_free(Model* model) { delete model; }

// weights and biases: of the four fused linears, [d_out][d_in] bfloat16 and [d_out] float32 (null: none). q_norm, k_norm [K] or null.
void atoll_layer(Model* model, int index, const bf16* const* weights, const float* const* biases, const float* input_norm, const float* post_norm,
                 const float* q_norm, const float* k_norm, int window) {
    const Shape& s = model->shape;
    Layer& layer = model->layers[index];
    for (int group = 0; group < GROUPS; group++) {
        auto row_of = [&](int c) -> long {
            Column column = s.column(group, c);
            if (column.member < 0) return -1;
            long before = 0;
            for (int member = 0; member < column.member; member++) before += s.member_width(group, member);
            return before + column.index;
        };
        Linear& linear = layer.linears[group];
        linear.pack(weights[group], s.input(group), s.columns(group), row_of);
        if (biases[group]) {
            linear.bias.assign(s.columns(group), 0.0f);
            for (int c = 0; c < s.columns(group); c++)
                if (row_of(c) >= 0) linear.bias[c] = biases[group][row_of(c)];
        }
    }
    layer.input_norm.assign(input_norm, input_norm + s.hidden);
    layer.post_norm.assign(post_norm, post_norm + s.hidden);
    if (q_norm) layer.q_norm.assign(q_norm, q_norm + s.head_size);
    if (k_norm) layer.k_norm.assign(k_norm, k_norm + s.head_size);
    layer.window = window;
}

long atoll_page_size(Model* model) { return model->shape.page_stride() * 2; }

// ranks [layers][7] in the order q k v o gate up down, 0 where the adapter changes nothing. Null when there is no memory.
Adapter* atoll_adapter(Model* model, const int32_t* ranks) {
    const Shape& s = model->shape;
    auto adapter = std::make_unique<Adapter>();
    adapter->sites.resize((size_t)s.layers * GROUPS);
    for (int layer = 0; layer < s.layers; layer++)
        for (int group = 0, first = 0; group < GROUPS; first += s.num_members(group), group++) {
            Site& site = adapter->sites[layer * GROUPS + group];
            int members = s.num_members(group), total = 0;
            const int32_t* rank = ranks + layer * 7 + first;
            for (int member = 0; member < members; member++) { site.z_start.push_back(total); total += up_to(rank[member], 2); }
            if (!total) continue;
            site.rank = up_to(total, LANES);
            adapter->widest = std::max(adapter->widest, site.rank);
            site.a = adapter->size;
            adapter->size += (long)up_to(s.input(group), PANEL) * site.rank;
            for (int c = 0; c < s.columns(group); c += LANES) {
                int low = total, high = 0;
                for (int i = 0; i < LANES; i++) {
                    int member = s.column(group, c + i).member;
                    if (member < 0 || !rank[member]) continue;
                    low = std::min(low, site.z_start[member]);
                    high = std::max(high, site.z_start[member] + up_to(rank[member], 2));
                }
                Block block{low / 2, std::max(0, high - low) / 2, adapter->size};
                site.blocks.push_back(block);
                adapter->size += (long)block.count * 2 * LANES;
            }
        }
    adapter->memory = (bf16*)aligned((size_t)adapter->size * 2 + 4096);
    if (!adapter->memory) return nullptr;
    memset(adapter->memory, 0, (size_t)adapter->size * 2 + 4096);
    return adapter.release();
}

long atoll_adapter_bytes(Adapter* adapter) { return adapter->size * 2; }
void atoll_adapter_free(Adapter* adapter) { delete adapter; }

// One linear's factors: a [rank][d_in], b [d_out][rank], float32; member counts within its group.
void atoll_adapter_set(Model* model, Adapter* adapter, int layer, int group, int member, const float* a, const float* b, int rank, float scaling) {
    const Shape& s = model->shape;
    Site& site = adapter->sites[layer * GROUPS + group];
    int k = s.input(group), start = site.z_start[member];
    auto rounded = [](float v) { Halves h = narrow(all(v)); return (bf16)h[0]; };
    bf16* to = adapter->memory + site.a;
    for (int r = 0; r < rank; r++)
        for (int i = 0; i < k; i++) to[((long)(i / 2) * site.rank + start + r) * 2 + i % 2] = rounded(a[(long)r * k + i]);
    for (int c = 0; c < s.columns(group); c++) {
        Column column = s.column(group, c);
        if (column.member != member) continue;
        const Block& block = site.blocks[c / LANES];
        bf16* into = adapter->memory + block.offset;
        for (int r = 0; r < rank; r++) {
            int place = start + r - 2 * block.first;
            into[(long)(place / 2) * 2 * LANES + c % LANES * 2 + place % 2] = rounded(b[(long)column.index * rank + r] * scaling);
        }
    }
}

// 0, or 1 when there is no memory for the batch.
int atoll_forward(Model* model, const Batch* batch, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    Forward forward(*model, *batch);
    char* scratch = model->reserve(forward.lay_out(nullptr, num_threads));
    if (!scratch) return 1;
    forward.lay_out(scratch, num_threads);
    model->team_of(num_threads).run(forward);
    return 0;
}

// hidden [rows][D] bfloat16 to logits [rows][V] float32, or (logits null) to the best value and token of each row.
int atoll_head(Model* model, const bf16* hidden, int num_rows, float* logits, float* best, int32_t* token, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    int width = model->shape.hidden, stride = up_to(width, PANEL);
    size_t own_size = (size_t)ROW_BLOCK * 4 * PANEL * 4, rows = up_to(num_rows, 16) + 16;
    char* scratch = model->reserve(rows * stride * 2 + num_threads * own_size + 4096);
    if (!scratch) return 1;
    Arena arena{scratch};
    bf16* x = arena.take<bf16>(rows * stride);
    for (int m = 0; m < num_rows; m++) {
        memcpy(x + (long)m * stride, hidden + (long)m * width, width * 2);
        memset(x + (long)m * stride + width, 0, (stride - width) * 2);
    }
    Head head{*model, num_rows, stride, x, logits, best, token, {}, {}, {}};
    for (int i = 0; i < num_threads; i++) head.own.push_back(arena.take<char>(own_size));
    head.values.resize(num_threads);
    head.tokens.resize(num_threads);
    model->team_of(num_threads).run(head);
    if (!logits) head.merge();
    return 0;
}

// One token for each row of logits [rows][V].
void atoll_draw(Model* model, const float* logits, const Draw* draws, int num_rows, int32_t* tokens, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    model->drawers.resize(std::max((size_t)num_threads, model->drawers.size()));
    int vocabulary = model->shape.vocabulary;
    auto body = [&](Team& team) {
        Drawer& drawer = model->drawers[Team::thread_index()];
        team.share(num_rows, [&](int m) { tokens[m] = drawer.draw(logits + (long)m * vocabulary, vocabulary, draws[m]); });
    };
    model->team_of(num_threads).run(body);
}
}
