// What Python calls, through ctypes (decoder.py and bank.py of this folder). Nothing throws through this door: where there is no memory a call returns
// null or 1.

#include "forward.h"
#include "head.h"
#include "sampling.h"

using namespace kernels;

extern "C" {

// What this library was built for, so that a stale file is never used: changes with the functions below.
int atoll_interface() { return 5; }

int atoll_usable() {
#if defined(ATOLL_AMX)
    return amx_allowed();
#else
    return 1;
#endif
}

// shape: hidden, mlp, layers, heads, kv_heads, head_size, vocabulary. embedding and head [V][D] bfloat16; the embedding must outlive the model.
Model* atoll_model(const int32_t* shape, float norm_eps, const bf16* embedding, const bf16* head, const float* final_norm) {
    try {
        auto model = std::make_unique<Model>();
        model->shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], norm_eps};
        model->layers.resize(shape[2]);
        model->embedding = embedding;
        int vocabulary = shape[6];
        model->head.pack(head, shape[0], up_to(vocabulary, PANEL), [&](int c) { return c < vocabulary ? c : -1; });
        model->final_norm.assign(final_norm, final_norm + shape[0]);
        return model.release();
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void atoll_model_free(Model* model) { delete model; }

// weights and biases: of the four fused linears, [d_out][d_in] bfloat16 and [d_out] float32 (null: none). q_norm, k_norm [K] or null. 0, or 1 when
// there is no memory.
int atoll_layer(Model* model, int index, const bf16* const* weights, const float* const* biases, const float* input_norm, const float* post_norm,
                const float* q_norm, const float* k_norm, int window) {
    const Shape& s = model->shape;
    Layer& layer = model->layers[index];
    try {
        for (int group = 0; group < GROUPS; group++) layer.linears[group].pack(s, group, weights[group], biases[group]);
        layer.input_norm.assign(input_norm, input_norm + s.hidden);
        layer.post_norm.assign(post_norm, post_norm + s.hidden);
        if (q_norm) layer.q_norm.assign(q_norm, q_norm + s.head_size);
        if (k_norm) layer.k_norm.assign(k_norm, k_norm + s.head_size);
        layer.window = window;
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

long atoll_page_size(Model* model) { return model->shape.page_stride() * 2; }

// Bytes of an adapter with these ranks: [layers][7] in the order q k v o gate up down, 0 where it changes nothing.
long atoll_adapter_size(Model* model, const int32_t* ranks) {
    Adapter adapter;
    lay_out(adapter, model->shape, ranks);
    return adapter.size * 2;
}

// Needs the model's sizes alone, so it may run beside a forward, as may atoll_adapter_set and _free.
Adapter* atoll_adapter(Model* model, const int32_t* ranks) {
    try {
        auto adapter = std::make_unique<Adapter>();
        lay_out(*adapter, model->shape, ranks);
        adapter->memory = (bf16*)zeroed((size_t)adapter->size * 2 + READ_AHEAD);
        return adapter->memory ? adapter.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void atoll_adapter_free(Adapter* adapter) { delete adapter; }

// One linear's factors: a [rank][d_in], b [d_out][rank], float32; members count within their group.
void atoll_adapter_set(Model* model, Adapter* adapter, int layer, int group, int member, const float* a, const float* b, int rank, float scaling) {
    set_factors(*adapter, model->shape, layer, group, member, a, b, rank, scaling);
}

// One linear's DoRA gains [d_out] float32, after its factors.
void atoll_adapter_gain(Model* model, Adapter* adapter, int layer, int group, int member, const float* gain) {
    set_gain(*adapter, model->shape, layer, group, member, gain);
}

// Edits with these ranks: [layers][6] in the order of Component, 0 where nothing is edited. As an adapter's, they may be made beside a forward.
Edits* atoll_edits(Model* model, const int32_t* ranks) {
    try {
        auto edits = std::make_unique<Edits>();
        lay_out(*edits, model->shape, ranks);
        edits->memory = (float*)zeroed((size_t)edits->size * 4);
        return edits->memory ? edits.release() : nullptr;
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

void atoll_edits_free(Edits* edits) { delete edits; }

// One place's tensors: a and u [rank][D], b [rank], float32; the first `activated` ranks go through the activation.
void atoll_edits_set(Model* model, Edits* edits, int layer, int component, const float* a, const float* b, const float* u, int activation, int activated) {
    set_edit(*edits, model->shape, layer * COMPONENTS + component, a, b, u, activation, activated);
}

// 0, or 1 when there is no memory for the batch.
int atoll_forward(Model* model, const Batch* batch, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    try {
        Forward forward(*model, *batch);
        forward.lay_out(model->reserve(forward.lay_out(nullptr, num_threads)), num_threads);
        model->team_of(num_threads).run(forward);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// hidden [rows][D] bfloat16 to logits [rows][V] float32, or (logits null) to the best value and token of each row. 0, or 1 when there is no memory.
int atoll_head(Model* model, const bf16* hidden, int num_rows, float* logits, float* best, int32_t* token, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    try {
        Head head(*model, hidden, num_rows, logits, num_threads);
        model->team_of(num_threads).run(head);
        if (!logits) head.merge(best, token);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

// One token for each row of logits [rows][V]. 0, or 1 when there is no memory.
int atoll_draw(Model* model, const float* logits, const Draw* draws, int num_rows, int32_t* tokens, int num_threads) {
    std::lock_guard<std::mutex> lock(model->busy);
    int vocabulary = model->shape.vocabulary;
    try {
        std::vector<Drawer> drawers(num_threads, Drawer(vocabulary));
        auto body = [&](Team& team) {
            Drawer& drawer = drawers[Team::thread_index()];
            team.share(num_rows, [&](int m) { tokens[m] = drawer.draw(logits + (long)m * vocabulary, vocabulary, draws[m]); });
        };
        model->team_of(num_threads).run(body);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
}
