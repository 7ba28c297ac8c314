// What a training step does between its matrix products, each in one pass over memory (a row's loss: in the cache) instead of five: norms, gates, rotations with the layout that
// attention wants, softmax, the loss at a label; forward and backward. Python calls them through ctypes (training.py of this folder).
//
// Threads are OpenMP's, from the very pool that torch's products use: two pools would spin against each other. Values are bfloat16 with arithmetic in
// float32; the residual stream is float32. A row's result does not depend on the threads.

#include <algorithm>
#include <cmath>
#include <new>

#include "simd.h"
#include "thin.h"

using namespace kernels;

namespace {

constexpr int MOST_KEYS = 4096;  // of a row whose scores stand in a thread's scratch

}  // namespace

extern "C" {

int atoll_training_interface() { return 3; }

// sum = x + y (y null: x alone, and sum is not written); normed = sum / rms(sum) * weight. x, sum [T][D] float32; y, normed bfloat16; inverse [T].
void atoll_norm(const float* x, const bf16* y, const float* weight, float eps, float* sum, bf16* normed, float* inverse, long tokens, int d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        const float* row = x + t * d;
        if (y) {
            in_vectors(d, [&](int i, int n) { store_some(sum + t * d + i, load_some(row + i, n) + widen_some(y + t * d + i, n), n); });
            row = sum + t * d;
        }
        Vec squares{};
        in_vectors(d, [&](int i, int n) { Vec v = load_some(row + i, n); squares += v * v; });
        float scale = inverse[t] = 1.0f / std::sqrt(sum_lanes(squares) / d + eps);
        in_vectors(d, [&](int i, int n) { narrow_some(normed + t * d + i, load_some(row + i, n) * scale * load_some(weight + i, n), n); });
    }
}

// dx = dsum + (g - n mean(g n)) / rms with n = sum / rms, g = dnormed * weight. dsum [T][D] float32 or null; dx float32; dy, if asked for, bfloat16.
void atoll_norm_backward(const bf16* dnormed, const float* dsum, const float* sum, const float* weight, const float* inverse, float* dx, bf16* dy, long tokens,
                         int d, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++) {
        Vec products{};
        in_vectors(d, [&](int i, int n) { products += widen_some(dnormed + t * d + i, n) * load_some(weight + i, n) * load_some(sum + t * d + i, n); });
        float scale = inverse[t], mean = sum_lanes(products) / d * scale * scale;
        in_vectors(d, [&](int i, int n) {
            Vec v = (widen_some(dnormed + t * d + i, n) * load_some(weight + i, n) - load_some(sum + t * d + i, n) * mean) * scale;
            if (dsum) v += load_some(dsum + t * d + i, n);
            store_some(dx + t * d + i, v, n);
            if (dy) narrow_some(dy + t * d + i, v, n);
        });
    }
}

// out = silu(gate) * up. gate_up [T][2 I], out [T][I].
void atoll_gated(const bf16* gate_up, bf16* out, long tokens, int inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++)
        in_vectors(inner, [&](int i, int n) {
            Vec gate = widen_some(gate_up + t * 2 * inner + i, n), up = widen_some(gate_up + (t * 2 + 1) * inner + i, n);
            narrow_some(out + t * inner + i, gate / (1.0f + exp(-gate)) * up, n);
        });
}

void atoll_gated_backward(const bf16* gate_up, const bf16* dout, bf16* dgate_up, long tokens, int inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < tokens; t++)
        in_vectors(inner, [&](int i, int n) {
            Vec gate = widen_some(gate_up + t * 2 * inner + i, n), up = widen_some(gate_up + (t * 2 + 1) * inner + i, n);
            Vec d = widen_some(dout + t * inner + i, n), sigmoid = 1.0f / (1.0f + exp(-gate)), silu = gate * sigmoid;
            narrow_some(dgate_up + t * 2 * inner + i, d * up * (sigmoid + silu * (1.0f - sigmoid)), n);
            narrow_some(dgate_up + (t * 2 + 1) * inner + i, d * silu, n);
        });
}

// Where the tokens of a block stand. tokens [count]: their places in the batch; places [count]: row * length + column in the block of rows x length.
// The first `before` tokens of every row's keys are those that stand in the batch from `shared` on.
struct Layout {
    const int64_t* tokens;
    const int64_t* places;
    int64_t count;
    int32_t rows, length, before;
    int64_t shared;
    int32_t heads, kv_heads, size;
};

}  // extern "C"

namespace {

// One head of one token, its two halves rotated by (cos, sin), or back by (cos, -sin).
template <class In, class Out> inline void rotate(const float* cos, const float* sin, int half, float sign, In in, Out out) {
    in_vectors(half, [&](int i, int n) {
        Vec c = load_some(cos + i, n), s = load_some(sin + i, n) * sign, a = in(i, n), b = in(half + i, n);
        out(i, n, a * c - b * s);
        out(half + i, n, b * c + a * s);
    });
}

inline void rotate_head(const bf16* from, bf16* to, const float* cos, const float* sin, int size, float sign) {
    rotate(cos, sin, size / 2, sign, [&](int i, int n) { return widen_some(from + i, n); }, [&](int i, int n, Vec v) { narrow_some(to + i, v, n); });
}

}  // namespace

extern "C" {

// qkv [T][(heads + 2 kv_heads) size] -> q [rows * kv_heads][(heads / kv_heads) * length][size], rotated, and k, v [rows * kv_heads][before + length][size],
// k rotated. cos, sin [T][size / 2]. Places that no token takes must be zero in q, k and v.
void atoll_spread(const Layout* at, const bf16* qkv, const float* cos, const float* sin, bf16* q, bf16* k, bf16* v, int threads) {
    const int size = at->size, kv = at->kv_heads, group = at->heads / kv, length = at->length, keys = at->before + length;
    const long stride = (long)(at->heads + 2 * kv) * size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < at->count + at->before; i++) {
        bool own = i < at->count;
        long t = own ? at->tokens[i] : at->shared + (i - at->count);
        const bf16* token = qkv + t * stride;
        const float *c = cos + t * (size / 2), *s = sin + t * (size / 2);
        if (own) {
            long row = at->places[i] / length, column = at->places[i] % length;
            for (int h = 0; h < at->heads; h++)
                rotate_head(token + h * size, q + (((row * kv + h / group) * group + h % group) * length + column) * size, c, s, size, 1);
            for (int h = 0; h < kv; h++) {
                long place = ((row * kv + h) * keys + at->before + column) * size;
                rotate_head(token + (at->heads + h) * size, k + place, c, s, size, 1);
                memcpy(v + place, token + (at->heads + kv + h) * size, size * sizeof(bf16));
            }
            continue;
        }
        for (int h = 0; h < kv; h++) {
            long column = i - at->count;
            bf16* first = k + (h * (long)keys + column) * size;
            rotate_head(token + (at->heads + h) * size, first, c, s, size, 1);
            for (long row = 0; row < at->rows; row++) {
                long place = ((row * kv + h) * keys + column) * size;
                if (row) memcpy(k + place, first, size * sizeof(bf16));
                memcpy(v + place, token + (at->heads + kv + h) * size, size * sizeof(bf16));
            }
        }
    }
}

// The way back: gradients of q, k, v to dqkv. Own tokens are written; the shared ones' keys and values are added, summed over the rows in float32.
void atoll_spread_backward(const Layout* at, const bf16* dq, const bf16* dk, const bf16* dv, const float* cos, const float* sin, bf16* dqkv, int threads) {
    const int size = at->size, kv = at->kv_heads, group = at->heads / kv, length = at->length, keys = at->before + length;
    const long stride = (long)(at->heads + 2 * kv) * size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < at->count; i++) {
        long t = at->tokens[i], row = at->places[i] / length, column = at->places[i] % length;
        bf16* token = dqkv + t * stride;
        const float *c = cos + t * (size / 2), *s = sin + t * (size / 2);
        for (int h = 0; h < at->heads; h++)
            rotate_head(dq + (((row * kv + h / group) * group + h % group) * length + column) * size, token + h * size, c, s, size, -1);
        for (int h = 0; h < kv; h++) {
            long place = ((row * kv + h) * keys + at->before + column) * size;
            rotate_head(dk + place, token + (at->heads + h) * size, c, s, size, -1);
            memcpy(token + (at->heads + kv + h) * size, dv + place, size * sizeof(bf16));
        }
    }
}

// After every block's own tokens: what the rows of this block add to the gradients of the beginning that they share.
void atoll_spread_shared_backward(const Layout* at, const bf16* dk, const bf16* dv, const float* cos, const float* sin, bf16* dqkv, int threads) {
    const int size = at->size, kv = at->kv_heads, keys = at->before + at->length;
    const long stride = (long)(at->heads + 2 * kv) * size;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long column = 0; column < at->before; column++) {
        long t = at->shared + column;
        const float *c = cos + t * (size / 2), *s = sin + t * (size / 2);
        for (int h = 0; h < kv; h++) {
            auto summed = [&](const bf16* from, int i, int n) {
                Vec v{};
                for (long row = 0; row < at->rows; row++) v += widen_some(from + ((row * kv + h) * keys + column) * size + i, n);
                return v;
            };
            bf16 *key = dqkv + t * stride + (at->heads + h) * size, *value = key + (long)kv * size;
            rotate(c, s, size / 2, -1.0f, [&](int i, int n) { return summed(dk, i, n); },
                   [&](int i, int n, Vec v) { narrow_some(key + i, widen_some(key + i, n) + v, n); });
            in_vectors(size, [&](int i, int n) { narrow_some(value + i, widen_some(value + i, n) + summed(dv, i, n), n); });
        }
    }
}

// out [T][heads size] from the block's [rows * kv_heads][(heads / kv_heads) * length][size]; or, backward, the other way into a zeroed block.
void atoll_gather(const Layout* at, bf16* out, bf16* block, int backward, int threads) {
    const int size = at->size, kv = at->kv_heads, group = at->heads / kv, length = at->length;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < at->count; i++) {
        long row = at->places[i] / length, column = at->places[i] % length;
        for (int h = 0; h < at->heads; h++) {
            bf16* token = out + (at->tokens[i] * at->heads + h) * size;
            bf16* place = block + (((row * kv + h / group) * group + h % group) * length + column) * size;
            if (backward) memcpy(place, token, size * sizeof(bf16));
            else memcpy(token, place, size * sizeof(bf16));
        }
    }
}

// softmax(scale * scores) in place over the keys that a query sees: of scores [rows][keys], row r is the query at column r % length of its block, which
// sees keys up to keys - length + r % length, of a window's width if window > 0. Other keys get 0. Returns 1 where rows are longer than the scratch.
int atoll_softmax(bf16* scores, long rows, int length, int keys, int window, float scale, int threads) {
    if (keys > MOST_KEYS) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        alignas(64) float weights[MOST_KEYS + LANES];
        bf16* row = scores + r * keys;
        int end = keys - length + (int)(r % length) + 1, begin = window > 0 ? std::max(0, end - window) : 0;
        Vec most = all(-INFINITY);
        in_vectors(end - begin, [&](int i, int n) {
            Vec v = widen_some(row + begin + i, n) * scale;
            if (n < LANES) for (int lane = n; lane < LANES; lane++) v[lane] = -INFINITY;
            store(weights + i, v);
            most = max(most, v);
        });
        float largest = max_lanes(most);
        Vec total{};
        in_vectors(end - begin, [&](int i, int) {
            Vec v = exp(load(weights + i) - largest);
            store(weights + i, v);
            total += v;
        });
        float inverse = 1.0f / sum_lanes(total);
        memset(row, 0, begin * sizeof(bf16));
        in_vectors(end - begin, [&](int i, int n) { narrow_some(row + begin + i, load(weights + i) * inverse, n); });
        memset(row + end, 0, (keys - end) * sizeof(bf16));
    }
    return 0;
}

// losses[r] = -log softmax(logits[r])[labels[r]], logits [rows][V]; with `gradient` the logits become softmax - one-hot, the gradient at them.
void atoll_label_loss(bf16* logits, const int64_t* labels, float* losses, long rows, int vocabulary, int gradient, int threads) {
    const int whole = vocabulary / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        bf16* row = logits + r * vocabulary;
        const float label = widen(row[labels[r]]);
        Vec most = all(label), total{};
        for (int i = 0; i < whole; i += LANES) most = max(most, widen(row + i));
        float largest = max_lanes(most);
        for (int i = whole; i < vocabulary; i++) largest = std::max(largest, widen(row[i]));
        for (int i = 0; i < whole; i += LANES) total += exp(widen(row + i) - largest);
        float sum = sum_lanes(total);
        for (int i = whole; i < vocabulary; i++) sum += std::exp(widen(row[i]) - largest);
        losses[r] = std::log(sum) - (label - largest);
        if (!gradient) continue;
        const float inverse = 1.0f / sum;
        for (int i = 0; i < whole; i += LANES) store_narrow(row + i, exp(widen(row + i) - largest) * inverse);
        for (int i = whole; i < vocabulary; i++) row[i] = narrow(std::exp(widen(row[i]) - largest) * inverse);
        row[labels[r]] = narrow(std::exp(label - largest) * inverse - 1.0f);
    }
}

// dscores = scale * weights * (dweights - sum(weights * dweights)), in place of dweights [rows][keys].
void atoll_softmax_backward(const bf16* weights, bf16* dweights, long rows, int keys, float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const bf16* w = weights + r * keys;
        bf16* d = dweights + r * keys;
        Vec products{};
        in_vectors(keys, [&](int i, int n) { products += widen_some(w + i, n) * widen_some(d + i, n); });
        float total = sum_lanes(products);
        in_vectors(keys, [&](int i, int n) { narrow_some(d + i, widen_some(w + i, n) * (widen_some(d + i, n) - total) * scale, n); });
    }
}

// y [T][d_out] += s (x Aᵀ) B for every segment; no two of them have a token in common. numbers, scalings: see ThinCall. Returns 1 where memory is short.
int atoll_thin(const int64_t* numbers, const float* scalings, bf16* y, int threads) try {
    ThinCall call(numbers, scalings, false);
    if (!call.scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < call.packing.size(); task++) call.pack(call.packing[task], false);
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < call.blocks.size(); task++) call.forward(call.blocks[task], y);
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

// From dy [T][d_out]: dx += s dy Bᵀ A, dA = s (dy Bᵀ)ᵀ x, dB = s zᵀ dy.
int atoll_thin_backward(const int64_t* numbers, const float* scalings, const bf16* dy, int threads) try {
    ThinCall call(numbers, scalings, true);
    if (!call.scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < call.packing.size(); task++) call.pack(call.packing[task], true);
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < call.blocks.size(); task++) call.backward(call.blocks[task], dy);
#pragma omp for schedule(dynamic)
        for (size_t task = 0; task < call.panels.size(); task++) call.gradients(call.panels[task], dy);
    }
    return 0;
} catch (const std::bad_alloc&) {
    return 1;
}

}  // extern "C"
