// What this machine can do right now: bytes read per second, and bf16 products per second, with one thread and with two.
//
// Printed beside every round of the bench, because a virtual machine's speed drifts. The product rate uses the widest instruction the processor has
// (AMX tiles, else AVX-512 BF16 dot products, else AVX2 FMA on floats), all operands in registers: the ceiling of any matrix product.
//
// Build: g++ -O3 -march=native -pthread controls.cpp -o controls. Output: one JSON object.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t kReadBytes = 256u << 20;  // far more than any cache
constexpr int kRepeats = 7;
constexpr long kProducts = 20'000'000;  // inner repetitions: 40 to 110 ms

double now_s() {
    using namespace std::chrono;
    return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Median seconds of `work(thread)` done by `threads` threads that start together.
double median_seconds(int threads, const std::function<void(int)>& work) {
    std::vector<double> seconds;
    for (int repeat = 0; repeat < kRepeats; repeat++) {
        std::atomic<int> ready{0};
        std::atomic<bool> go{false};
        std::vector<std::thread> pool;
        for (int id = 0; id < threads; id++)
            pool.emplace_back([&, id] {
                ready++;
                while (!go) std::this_thread::yield();
                work(id);
            });
        while (ready < threads) std::this_thread::yield();
        double started = now_s();
        go = true;
        for (auto& thread : pool) thread.join();
        seconds.push_back(now_s() - started);
    }
    std::nth_element(seconds.begin(), seconds.begin() + kRepeats / 2, seconds.end());
    return seconds[kRepeats / 2];
}

typedef uint64_t Words __attribute__((vector_size(64)));

// Sum a stretch of memory in four independent vectors, so that loads and not additions are the limit.
uint64_t read_all(const char* from, size_t bytes) {
    Words sums[4] = {};
    for (size_t at = 0; at + 256 <= bytes; at += 256)
        for (int k = 0; k < 4; k++) sums[k] += *reinterpret_cast<const Words*>(from + at + 64 * k);
    Words sum = sums[0] + sums[1] + sums[2] + sums[3];
    return sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

// Each version: do kProducts rounds of independent products, return floating-point operations done.
#if defined(__AMX_BF16__)
const char* const kProductName = "amx_bf16";

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
};

double multiply() {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) config.column_bytes[tile] = 64, config.rows[tile] = 16;
    asm volatile("" ::"r"(&config) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0);  // 0 to 3 add up, 4 to 7 are read
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (long i = 0; i < kProducts / 4; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return kProducts * 2.0 * 16 * 16 * 32;
}

bool prepare() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }
#elif defined(__AVX512BF16__)
const char* const kProductName = "avx512_bf16";

double multiply() {
    __m512 sums[12];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    __m512bh a, b;
    memset(&a, 0, sizeof a), memset(&b, 0, sizeof b);
    asm volatile("" : "+v"(a), "+v"(b));
    for (long i = 0; i < kProducts; i++)
        for (auto& sum : sums) {
            sum = _mm512_dpbf16_ps(sum, a, b);
            asm volatile("" : "+v"(sum));
        }
    return kProducts * 12 * 2.0 * 32;
}

bool prepare() { return true; }
#elif defined(__AVX2__) && defined(__FMA__)
const char* const kProductName = "avx2_fma_f32";

double multiply() {
    __m256 sums[12];
    for (auto& sum : sums) sum = _mm256_setzero_ps();
    __m256 a = _mm256_setzero_ps(), b = a;
    asm volatile("" : "+x"(a), "+x"(b));
    for (long i = 0; i < kProducts; i++)
        for (auto& sum : sums) {
            sum = _mm256_fmadd_ps(a, b, sum);
            asm volatile("" : "+x"(sum));
        }
    return kProducts * 12 * 2.0 * 8;
}

bool prepare() { return true; }
#else
const char* const kProductName = "none";
double multiply() { return 0; }
bool prepare() { return false; }
#endif

}  // namespace

int main() {
    std::vector<char> owner(kReadBytes + 64, 1);
    const char* memory = owner.data() + (64 - reinterpret_cast<uintptr_t>(owner.data()) % 64) % 64;
    std::atomic<uint64_t> sink{0};
    double read_gb_s[2], gflop_s[2] = {0, 0};
    bool multiplies = prepare();
    for (int threads = 1; threads <= 2; threads++) {
        size_t share = kReadBytes / threads;
        read_gb_s[threads - 1] = kReadBytes / median_seconds(threads, [&](int id) { sink += read_all(memory + id * share, share); }) / 1e9;
        if (!multiplies) continue;
        std::vector<double> done(threads);
        double seconds = median_seconds(threads, [&](int id) { done[id] = multiply(); });
        gflop_s[threads - 1] = threads * done[0] / seconds / 1e9;
    }
    printf("{\"read_gb_s\": [%.1f, %.1f], \"product_gflop_s\": [%.0f, %.0f], \"product\": \"%s\"}\n", read_gb_s[0], read_gb_s[1], gflop_s[0], gflop_s[1],
           multiplies ? kProductName : "none");
}
