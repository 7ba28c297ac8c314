// From hidden states to logits, or straight to the best token.
#pragma once

#include <limits>

#include "model.h"

namespace kernels {

// hidden [rows][D] through the head: all logits, or the best token of each row.
class Head {
  public:
    // hidden [rows][D]; logits [rows][V], or null for the best tokens alone.
    Head(Model& model, const bf16* hidden, int num_rows, float* logits, int num_threads)
        : model_(model), num_rows_(num_rows), stride_(up_to(model.shape.hidden, PANEL)), logits_(logits), own_(num_threads), values_(num_threads),
          tokens_(num_threads) {
        size_t own_size = (size_t)ROW_BLOCK * CHUNK * PANEL * 4, rows = up_to(num_rows, 16) + 16;
        Arena arena{model.reserve(rows * stride_ * 2 + num_threads * (own_size + 128) + 128)};
        x_ = arena.take<bf16>(rows * stride_);
        int width = model.shape.hidden;
        for (int m = 0; m < num_rows; m++) {
            memcpy(x_ + (long)m * stride_, hidden + (long)m * width, width * 2);
            memset(x_ + (long)m * stride_ + width, 0, (stride_ - width) * 2);
        }
        for (int i = 0; i < num_threads; i++) {
            own_[i] = arena.take<float>(own_size / 4);
            values_[i].assign(num_rows, -std::numeric_limits<float>::infinity());
            tokens_[i].assign(num_rows, NONE);
        }
    }

    void operator()(Team& team) {
#if defined(ATOLL_AMX)
        amx_begin();
#endif
        const Linear& w = model_.head;
        int me = Team::thread_index(), vocabulary = model_.shape.vocabulary, chunks = (w.panels + CHUNK - 1) / CHUNK;
        team.share(chunks, [&](int task) {
            int from = task * CHUNK, to = std::min(w.panels, from + CHUNK), columns = std::min(vocabulary, to * PANEL) - from * PANEL;
            float* sums = own_[me];
            for (int first = 0; first < num_rows_; first += ROW_BLOCK) {
                int count = std::min(ROW_BLOCK, num_rows_ - first);
                for (int p = from; p < to; p++)
                    long_product(count, sums + (p - from) * PANEL, CHUNK * PANEL, x_ + (long)first * stride_, stride_, w.panel(p), w.pairs, w.ahead(p, first));
                for (int m = first; m < first + count; m++) {
                    const float* row = sums + (long)(m - first) * CHUNK * PANEL;
                    if (logits_) memcpy(logits_ + (long)m * vocabulary + from * PANEL, row, columns * 4);
                    else keep_best(me, m, row, from * PANEL, columns);
                }
            }
        });
#if defined(ATOLL_AMX)
        amx_end();
#endif
    }

    // The best of all threads' finds.
    void merge(float* best, int32_t* token) const {
        for (int m = 0; m < num_rows_; m++) {
            float value = values_[0][m];
            int32_t at = tokens_[0][m];
            for (size_t i = 1; i < values_.size() && value == value; i++) {
                float other = values_[i][m];
                if (other != other || other > value || (other == value && tokens_[i][m] < at)) { value = other; at = tokens_[i][m]; }
            }
            best[m] = value;
            token[m] = at == NONE ? 0 : at;
        }
    }

  private:
    static constexpr int CHUNK = 4;  // panels a task takes
    static constexpr int32_t NONE = std::numeric_limits<int32_t>::max();

    // The largest value, the first token of equal ones; a NaN wins over everything.
    void keep_best(int me, int m, const float* row, int column, int count) {
        Vec top = all(-std::numeric_limits<float>::infinity());
        Ints strange{};
        int i = 0;
        for (; i + LANES <= count; i += LANES) { Vec v = load(row + i); top = max(v, top); strange |= v != v; }
        float most = max_lanes(top);
        for (int j = i; j < count; j++) { most = row[j] > most ? row[j] : most; strange[0] |= row[j] != row[j] ? -1 : 0; }
        for (int lane = 0; lane < LANES; lane++)
            if (strange[lane]) values_[me][m] = std::numeric_limits<float>::quiet_NaN();
        if (!(most >= values_[me][m])) return;
        int place = 0;
        while (place < count && row[place] != most) place++;
        if (place == count || (most == values_[me][m] && column + place > tokens_[me][m])) return;
        values_[me][m] = most;
        tokens_[me][m] = column + place;
    }

    Model& model_;
    const int num_rows_, stride_;
    float* logits_;
    bf16* x_;
    std::vector<float*> own_;  // each thread's sums
    std::vector<std::vector<float>> values_;
    std::vector<std::vector<int32_t>> tokens_;
};

}  // namespace kernels
