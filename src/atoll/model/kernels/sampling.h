// One token drawn from a row of logits: the arithmetic of engine/sampler.py for temperature, top_k, top_p and min_p, a pass or two over the vocabulary.
//
// Probabilities are kept as multiples of the largest one. Which tokens stay is one threshold (equal ones stay together), and the draw is looked up in
// the cumulative distribution in vocabulary order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "shape.h"

namespace kernels {

struct Draw {
    float temperature;
    int32_t top_k;  // 0: off
    float top_p;    // 1: off
    float min_p;    // 0: off
    double random;  // in [0, 1)
};

class Drawer {
  public:
    explicit Drawer(int vocabulary) : bins_(NUM_BINS), p_(up_to(vocabulary, BLOCK)) { ranked_.reserve(vocabulary); sums_.reserve(p_.size() / BLOCK); }

    // logits [count]; returns the token. At least one logit is finite, none is NaN.
    int32_t draw(const float* logits, int count, const Draw& want) {
        count_ = count;
        weigh(logits, want.temperature);
        float floor = std::max(want.min_p, std::numeric_limits<float>::min());
        if ((want.top_k && want.top_k < count) || want.top_p < 1) floor = std::max(floor, ranked_floor(want));
        return look_up(floor, want.random);
    }

  private:
    static constexpr int BLOCK = 256;  // tokens whose sum is kept

    // p = exp((logit - largest) / temperature), padded with zeros to whole vectors.
    void weigh(const float* logits, float temperature) {
        Vec most = all(-std::numeric_limits<float>::infinity());
        int i = 0;
        for (; i + LANES <= count_; i += LANES) most = max(load(logits + i), most);
        float largest = max_lanes(most), scale = 1 / temperature;
        for (int j = i; j < count_; j++) largest = std::max(largest, logits[j]);
        for (i = 0; i + LANES <= count_; i += LANES) store(&p_[i], min(exp((load(logits + i) - largest) * scale), all(1.0f)));
        for (; i < count_; i++) p_[i] = std::min(std::exp((logits[i] - largest) * scale), 1.0f);
    }

    double mass_from(float floor) {
        double total = 0;
        sums_.clear();
        for (size_t start = 0; start < p_.size(); start += BLOCK) {
            Vec sum{};
            for (int i = 0; i < BLOCK; i += LANES) { Vec p = load(&p_[start + i]); sum += p >= floor ? p : Vec{}; }
            sums_.push_back(sum_lanes(sum));
            total += sums_.back();
        }
        return total;
    }

    // The least p that top_k, then top_p of what it left, keep. Tokens are counted by the leading bits of p, so that only the bin where the limit falls
    // has to be sorted.
    float ranked_floor(const Draw& want) {
        bins_.assign(NUM_BINS, {});
        for (int i = 0; i < count_; i++) { Bin& bin = bins_[bin_of(p_[i])]; bin.count++; bin.mass += p_[i]; }
        int most = want.top_k ? std::min(want.top_k, count_) : count_;
        double target = std::numeric_limits<double>::infinity();
        if (want.top_p < 1) {
            target = 0;
            if (want.top_k) first(most, std::numeric_limits<double>::infinity(), &target);
            else for (const Bin& bin : bins_) target += bin.mass;
            target *= want.top_p;
        }
        return first(most, target, nullptr);
    }

    // The p of the last of the likeliest tokens: as many as reach `target` in mass, at most `most`. Their mass goes to *mass.
    float first(int most, double target, double* mass) {
        double before = 0;
        int seen = 0;
        float last = 1;
        for (int b = NUM_BINS - 1; b >= 0 && seen < most && before < target; b--) {
            const Bin& bin = bins_[b];
            if (!bin.count) continue;
            if (seen + bin.count < most && before + bin.mass < target) { seen += bin.count; before += bin.mass; last = 0; continue; }
            ranked_.clear();
            for (int i = 0; i < count_; i++)
                if (bin_of(p_[i]) == b) ranked_.push_back(p_[i]);
            std::sort(ranked_.begin(), ranked_.end(), std::greater<float>());
            for (size_t i = 0; i < ranked_.size() && seen < most && before < target; i++) { last = ranked_[i]; before += last; seen++; }
        }
        if (mass) *mass = before;
        return last;
    }

    static int bin_of(float p) { uint32_t bits; memcpy(&bits, &p, 4); return (int)(bits >> 19); }

    int32_t look_up(float floor, double random) {
        double wanted = random * mass_from(floor);
        size_t block = 0;
        while (block + 1 < sums_.size() && wanted >= sums_[block]) wanted -= sums_[block++];
        int last = -1;
        for (int i = (int)block * BLOCK; i < count_; i++) {
            if (p_[i] < floor) continue;
            last = i;
            wanted -= p_[i];
            if (wanted < 0) return i;
        }
        if (last >= 0) return last;  // rounding at the very end
        for (int i = count_ - 1; i > 0; i--)
            if (p_[i] >= floor) return i;
        return 0;
    }

    static constexpr int NUM_BINS = (0x3f800000 >> 19) + 1;  // p is at most 1
    struct Bin { int count = 0; double mass = 0; };

    int count_ = 0;
    std::vector<Bin> bins_;
    std::vector<float> p_, ranked_;
    std::vector<double> sums_;
};

}  // namespace kernels
