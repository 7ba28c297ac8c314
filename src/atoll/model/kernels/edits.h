// ReFT's edits of hidden states, Δ = Uᵀ f(A h + b) in float32 (model/reft.py has the formulas): the tensors of one side of one part of a resident
// adapter in one block of memory, in the order of their use, and which tokens of a batch they edit.
//
//     A, U  by four ranks: [D / 16][4][16], the last ones as many as are left; zero beyond D
//     b     [R]
//
// The formula is evaluated for one token at a time, always in the same order, so a token's bits depend on nothing else in the batch.
#pragma once

#include <cmath>
#include <type_traits>
#include <vector>

#include "shape.h"

namespace kernels {

enum Component { BLOCK_INPUT, ATTENTION_INPUT, ATTENTION_OUTPUT, MLP_INPUT, MLP_OUTPUT, BLOCK_OUTPUT, COMPONENTS };  // reft.COMPONENTS
enum Activation { IDENTITY, RELU, GELU, SILU, TANH, SIGMOID };                                                       // reft.ACTIVATIONS from 1
constexpr int RANKS = 4;  // that go past a hidden state together

struct EditSite {
    int rank = 0;       // 0: nothing is edited here
    int activated = 0;  // ranks from the first that go through the activation
    Activation activation = IDENTITY;
    long a = 0, b = 0, u = 0;
};

struct Edits {
    std::vector<EditSite> sites;  // layer * COMPONENTS + component
    float* memory = nullptr;
    long size = 0;  // floats
    int widest = 0;
    Edits() = default;
    Edits(const Edits&) = delete;
    ~Edits() { free(memory); }
};

// Give every edit with these ranks ([layers][COMPONENTS]) its place.
inline void lay_out(Edits& edits, const Shape& s, const int32_t* ranks) {
    long width = up_to(s.hidden, LANES);
    for (int i = 0; i < s.layers * COMPONENTS; i++) {
        EditSite site;
        site.rank = ranks[i];
        site.a = edits.size;
        site.b = site.a + width * site.rank;
        site.u = site.b + up_to(site.rank, LANES);
        edits.size = site.u + width * site.rank;
        edits.widest = std::max(edits.widest, site.rank);
        edits.sites.push_back(site);
    }
}

// Fill in one place's tensors: a and u [rank][D], b [rank].
inline void set_edit(Edits& edits, const Shape& s, int place, const float* a, const float* b, const float* u, int activation, int activated) {
    EditSite& site = edits.sites[place];
    site.activation = (Activation)activation;
    site.activated = activated;
    long width = up_to(s.hidden, LANES);
    for (int r = 0; r < site.rank; r++) {
        int first = r / RANKS * RANKS, together = std::min(RANKS, site.rank - first);
        long start = first * width + (r - first) * LANES;
        for (int i = 0; i < s.hidden; i++) {
            long to = start + (long)(i / LANES) * together * LANES + i % LANES, from = (long)r * s.hidden + i;
            edits.memory[site.a + to] = a[from];
            edits.memory[site.u + to] = u[from];
        }
        edits.memory[site.b + r] = b[r];
    }
}

// One rank's value through an activation, NaN staying NaN; gelu is the exact one.
inline float activate(Activation activation, float z) {
    switch (activation) {
        case RELU: return z < 0 ? 0.0f : z;
        case GELU: return 0.5f * z * (1.0f + std::erf(z * 0.70710678118654752f));
        case SILU: return z / (1.0f + std::exp(-z));
        case TANH: return std::tanh(z);
        case SIGMOID: return 1.0f / (1.0f + std::exp(-z));
        default: return z;
    }
}

// work(count of neighbouring ranks, the first of them, where their rows of a factor begin) for all ranks of a place; the count is a constant.
template <class Work> void each_ranks(const EditSite& site, int vectors, const float* factor, Work work) {
    auto place = [&](int r) { return factor + (long)r * LANES * vectors; };
    int r = 0;
    for (; r + RANKS <= site.rank; r += RANKS) work(std::integral_constant<int, RANKS>{}, r, place(r));
    switch (site.rank - r) {
        case 3: return work(std::integral_constant<int, 3>{}, r, place(r));
        case 2: return work(std::integral_constant<int, 2>{}, r, place(r));
        case 1: return work(std::integral_constant<int, 1>{}, r, place(r));
    }
}

// z [rank] = f(A h + b); read(vector) gives sixteen columns of h.
template <class Read> void project(Read read, int vectors, const EditSite& site, const float* memory, float* z) {
    each_ranks(site, vectors, memory + site.a, [&](auto count, int first, const float* a) {
        Vec sums[count] = {};
        for (int v = 0; v < vectors; v++, a += count * LANES) {
            Vec state = read(v);
            for (int r = 0; r < count; r++) sums[r] += load(a + r * LANES) * state;
        }
        for (int r = 0; r < count; r++) z[first + r] = sum_lanes(sums[r]) + memory[site.b + first + r];
    });
    for (int r = 0; r < site.activated; r++) z[r] = activate(site.activation, z[r]);
}

// change [vectors][16] += Uᵀ z, or = where it is new.
inline void add_change(float* change, bool is_new, int vectors, const EditSite& site, const float* memory, const float* z) {
    each_ranks(site, vectors, memory + site.u, [&](auto count, int first, const float* u) {
        float factors[count];
        for (int r = 0; r < count; r++) factors[r] = z[first + r];
        bool adds = !is_new || first;
        for (int v = 0; v < vectors; v++, u += count * LANES) {
            Vec sum = adds ? load(change + v * LANES) : Vec{};
            for (int r = 0; r < count; r++) sum += load(u + r * LANES) * factors[r];
            store(change + v * LANES, sum);
        }
    });
}

// Tokens [count] of a batch, each once, that one side edits.
struct EditedTokens {
    const Edits* edits;
    const int64_t* tokens;
    int64_t count;
};

// The edits of one batch by token.
struct BatchEdits {
    int vectors, most_ranks = 0;      // of a state; of one token's edits
    std::vector<int> starts;          // [T + 1] into `edits`; empty in a batch that edits nothing
    std::vector<const Edits*> edits;  // of each token in the order of the groups
    std::vector<char> places;         // layer * COMPONENTS + component: whether any token is edited there

    BatchEdits(const Shape& s, int num_tokens, const EditedTokens* groups, int num_groups) : vectors(up_to(s.hidden, LANES) / LANES) {
        if (!num_groups) return;
        starts.assign(num_tokens + 2, 0);  // one ahead while they are counted and filled in
        places.assign((size_t)s.layers * COMPONENTS, 0);
        std::vector<int> ranks(num_tokens, 0);
        for (const EditedTokens* group = groups; group < groups + num_groups; group++) {
            for (int64_t i = 0; i < group->count; i++) {
                starts[group->tokens[i] + 2]++;
                most_ranks = std::max(most_ranks, ranks[group->tokens[i]] += group->edits->widest);
            }
            for (size_t place = 0; place < places.size(); place++) places[place] |= group->edits->sites[place].rank > 0;
        }
        for (int t = 2; t < num_tokens + 2; t++) starts[t] += starts[t - 1];
        edits.resize(starts.back());
        for (const EditedTokens* group = groups; group < groups + num_groups; group++)
            for (int64_t i = 0; i < group->count; i++) edits[starts[group->tokens[i] + 1]++] = group->edits;
        starts.pop_back();
    }

    size_t scratch_size() const { return (size_t)(vectors * LANES + most_ranks) * sizeof(float); }

    bool has(int token) const { return !starts.empty() && starts[token] < starts[token + 1]; }
    bool anywhere(int place) const { return !places.empty() && places[place]; }
    // Where anywhere(place).
    bool at(int token, int place) const {
        for (int i = starts[token]; i < starts[token + 1]; i++)
            if (edits[i]->sites[place].rank) return true;
        return false;
    }

    // write(vector, h + ΣΔ) for every sixteen columns of a token's state h, which read(vector) gives: all Δ of the h before any of them. Where the
    // token is not edited at this place, nothing is written.
    template <class Read, class Write> void apply(int token, int place, float* scratch, Read read, Write write) const {
        float *change = scratch, *const values = scratch + vectors * LANES, *z = values;
        auto each = [&](auto work) {
            z = values;
            for (int i = starts[token]; i < starts[token + 1]; i++)
                if (const EditSite& site = edits[i]->sites[place]; site.rank) {
                    work(site, edits[i]->memory);
                    z += site.rank;
                }
        };
        each([&](const EditSite& site, const float* memory) { project(read, vectors, site, memory, z); });
        if (z == values) return;
        each([&](const EditSite& site, const float* memory) { add_change(change, z == values, vectors, site, memory, z); });
        for (int v = 0; v < vectors; v++) write(v, read(v) + load(change + v * LANES));
    }

    // Edit a state where it stands.
    void edit(int token, int place, float* scratch, float* row) const {
        apply(token, place, scratch, [=](int v) { return load(row + v * LANES); }, [=](int v, Vec state) { store(row + v * LANES, state); });
    }
    void edit(int token, int place, float* scratch, bf16* row) const {
        apply(token, place, scratch, [=](int v) { return widen(row + v * LANES); }, [=](int v, Vec state) { store_narrow(row + v * LANES, state); });
    }
    // row += the edited output.
    void add_output(int token, int place, float* scratch, const float* output, float* row) const {
        apply(token, place, scratch, [=](int v) { return load(output + v * LANES); },
              [=](int v, Vec state) { store(row + v * LANES, load(row + v * LANES) + state); });
    }
};

}  // namespace kernels
