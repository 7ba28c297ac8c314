// The forward of a Llama-like decoder over a packed batch: prefill, chunks of a prompt, decode, or all at once.
//
// It computes what model/decoder.py computes: residual stream and sums in float32, inputs of products rounded to bfloat16. The threads go through the
// layers together, phase by phase (threads.h). A row's numbers never depend on the other rows, on the number of threads, or on how its prompt was cut:
// they are bitwise the same.
//
// Keys and values live in pages of 32 tokens, packed as panels: keys [K / 2][32 tokens][2], values [K / 32][16 token pairs][32][2], for each page, layer
// and key head.
#pragma once

#include <cmath>
#include <limits>

#include "adapter.h"
#include "edits.h"
#include "model.h"

namespace kernels {

constexpr int CHUNK_BYTES = 256 << 10;  // of weights that a task keeps in its cache while rows pass by
constexpr int QUERIES = 12;             // of one key head that go through its pages together

// What one call works on. Lengths in comments; D hidden size, K head size.
struct Batch {
    int num_rows, num_tokens, num_outputs, max_pages;
    int num_edits;               // groups of tokens that ReFT edits; 0 in a step that only decodes
    const int32_t* token_ids;    // [T]
    const int32_t* row_starts;   // [rows + 1]
    const int32_t* context;      // [rows]
    const int32_t* pages;        // [rows][max_pages]
    const float* cos;            // [T][K / 2]
    const float* sin;            // [T][K / 2]
    const int32_t* outputs;      // [num_outputs] tokens whose hidden states are wanted
    Adapter* const* adapters;    // [rows], null where a row uses the base alone
    const EditedTokens* edits;   // [num_edits], a token's parts in order
    bf16* cache;                 // the pages
    bf16* hidden;                // [num_outputs][D], written
};

inline void rms_norm(const float* x, const float* weight, int width, float eps, bf16* out, int padded) {
    Vec squares{};
    int i = 0;
    for (; i + LANES <= width; i += LANES) { Vec v = load(x + i); squares += v * v; }
    float total = sum_lanes(squares);
    for (int j = i; j < width; j++) total += x[j] * x[j];
    float scale = 1.0f / std::sqrt(total / width + eps);
    for (i = 0; i + LANES <= width; i += LANES) store_narrow(out + i, load(x + i) * scale * load(weight + i));
    for (; i < width; i++) out[i] = narrow(x[i] * scale * weight[i]);
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
    BatchEdits edits;

    float *residual, *qkv;
    bf16 *x, *q, *attended, *gated, *z;
    int x_stride, attended_stride, gated_stride, qkv_stride;
    std::vector<char*> own;  // each thread's scratch
    size_t own_size;

    Forward(Model& m, const Batch& b) : model(m), s(m.shape), batch(b), edits(s, b.num_tokens, b.edits, b.num_edits) {
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
        qkv_stride = std::max(s.columns(QKV), x_stride);
        residual = arena.take<float>((size_t)tokens * x_stride);
        qkv = arena.take<float>((size_t)tokens * qkv_stride);
        x = arena.take<bf16>((size_t)tokens * x_stride);
        q = arena.take<bf16>((size_t)tokens * s.q_width() + LANES);
        attended = arena.take<bf16>((size_t)tokens * attended_stride);
        gated = arena.take<bf16>((size_t)tokens * gated_stride);
        z = arena.take<bf16>((size_t)tokens * z_stride + 2 * LANES);
        int width = up_to(s.head_size, PANEL);
        own_size = std::max((size_t)ROW_BLOCK * 16 * PANEL * 4, (size_t)QUERIES * (width * 2 + width * 4 + (size_t)most_keys * 6)) + 4096;
        own_size = std::max(own_size, (size_t)x_stride * sizeof(float) + edits.scratch_size());
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
                for (int i = s.hidden; i < x_stride; i++) to[i] = 0;
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

    float* residual_of(int t) { return residual + (long)t * x_stride; }
    // Where a linear's output waits for its edit: q, k and v are read by then, and not yet written again.
    float* parked(int t) { return qkv + (long)t * qkv_stride; }
    // The first x_stride floats of a thread's scratch are for a copy of the row that is edited.
    float* edit_scratch() { return (float*)mine() + x_stride; }
    static int place_of(int layer, int component) { return layer * COMPONENTS + component; }

    // What is left to do for an edited token's residual behind a block.
    void edit_block_output(int t, int layer, float* row) {
        edits.add_output(t, place_of(layer, MLP_OUTPUT), edit_scratch(), parked(t), row);
        edits.edit(t, place_of(layer, BLOCK_OUTPUT), edit_scratch(), row);
    }

    void edit_before_norm(int t, int layer, int group) {
        float* row = residual_of(t);
        if (group == GATE_UP) return edits.add_output(t, place_of(layer, ATTENTION_OUTPUT), edit_scratch(), parked(t), row);
        if (layer) edit_block_output(t, layer - 1, row);
        edits.edit(t, place_of(layer, BLOCK_INPUT), edit_scratch(), row);
    }

    // x = norm of the residual, and z for the linear that reads it.
    void norm_and_shrink(int layer, int group, const std::vector<float>& weight) {
        int step = batch.num_tokens > 256 ? 8 : 1;
        team->share(((int)groups.size() + step - 1) / step, [&](int task) {
            for (int g = task * step; g < std::min((int)groups.size(), task * step + step); g++) {
                const Rows& rows = groups[g];
                for (int t = rows.start; t < rows.start + rows.count; t++) {
                    bool edited = edits.has(t);
                    bf16* normed = x + (long)t * x_stride;
                    if (edited) edit_before_norm(t, layer, group);
                    rms_norm(residual_of(t), weight.data(), s.hidden, s.norm_eps, normed, x_stride);
                    if (edited) edits.edit(t, place_of(layer, group == QKV ? ATTENTION_INPUT : MLP_INPUT), edit_scratch(), normed);
                }
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
                    if (const Site* site = site_of(adapter, layer, group)) {
                        expand(row, site->blocks.data(), from * 2, to * 2, adapter->memory, z + (long)t * z_stride,
                               t + 1 < first + count ? factors_of(t + 1, t, layer, group, from * 2) : nullptr);
                        if (!site->gain.empty())
                            for (int i = 0; i < (to - from) * PANEL; i += LANES) store(row + i, load(row + i) * load(&site->gain[from * PANEL + i]));
                    }
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
        for (; i < count; i++) to[i] = narrow(from[i]);
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
        auto add_or_park = [&](int component) {
            int place = place_of(index, component);
            bool parks = edits.anywhere(place);
            return [=, this](int t, int column, const float* sums, int count) {
                if (parks && edits.at(t, place)) { memcpy(parked(t) + column, sums, count * 4); return; }
                float* row = residual_of(t) + column;
                for (int i = 0; i < count; i += LANES) store(row + i, load(row + i) + load(sums + i));
            };
        };
        norm_and_shrink(index, QKV, weights.input_norm);
        linear(index, QKV, x, x_stride, [&](int t, int column, const float* sums, int count) { memcpy(qkv + (long)t * qkv_stride + column, sums, count * 4); });
        rotate_and_store(index);
        attend(index);
        shrink_all(index, OUT, attended, attended_stride);
        linear(index, OUT, attended, attended_stride, add_or_park(ATTENTION_OUTPUT));
        norm_and_shrink(index, GATE_UP, weights.post_norm);
        linear(index, GATE_UP, x, x_stride, [&](int t, int column, const float* sums, int count) {
            bf16* row = gated + (long)t * gated_stride + column / 2;
            for (int i = 0; i < count; i += PANEL) {
                Vec gate = load(sums + i), up = load(sums + i + LANES);
                store_narrow(row + i / 2, gate / (1.0f + exp(-gate)) * up);
            }
        });
        shrink_all(index, DOWN, gated, gated_stride);
        linear(index, DOWN, gated, gated_stride, add_or_park(MLP_OUTPUT));
    }

    // A token may be wanted more than once, so the last block's edits go into a copy.
    void outputs() {
        team->share(batch.num_outputs, [&](int n) {
            int t = batch.outputs[n];
            const float* row = residual_of(t);
            if (edits.has(t)) {
                float* copy = (float*)mine();
                memcpy(copy, row, (size_t)x_stride * sizeof(float));
                edit_block_output(t, s.layers - 1, copy);
                row = copy;
            }
            rms_norm(row, model.final_norm.data(), s.hidden, s.norm_eps, batch.hidden + (long)n * s.hidden, s.hidden);
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

}  // namespace kernels
