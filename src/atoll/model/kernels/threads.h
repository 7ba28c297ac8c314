// A few threads that stay awake between the many short phases of one forward, and sleep between forwards.
//
// A phase hands out numbered tasks through counters, so a thread that the system stops for a while delays no other. What a task computes never
// depends on who computes it. Between phases the threads meet at a barrier.
#pragma once

#include <unistd.h>

#include <atomic>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kernels {

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// One forward's meeting place: the barrier, and the counter of the running phase.
class Team {
  public:
    explicit Team(int size) : size_(size), counters_(2 * size), next_{counters_.data(), counters_.data() + size} {}
    int size() const { return size_; }

    // Call run(task) for every task from 0 to count, shared among the threads, and wait until all are done. Each thread goes through its own part in
    // order, so that what comes next in memory is what it will need, and then helps the others.
    template <class Run> void share(int count, Run run) {
        if (size_ == 1) {
            for (int task = 0; task < count; task++) run(task);
            return;
        }
        Counter* next = next_[phase_of_this_thread() & 1];
        for (int i = 0, part = thread_index(); i < size_; i++, part = (part + 1) % size_) {
            int first = (int)((long)count * part / size_), end = (int)((long)count * (part + 1) / size_);
            for (int task; (task = first + next[part].taken.fetch_add(1, std::memory_order_relaxed)) < end;) run(task);
        }
        barrier(next);
    }

    void join(int index) { thread_index() = index; phase_of_this_thread() = 0; }
    static int& thread_index() { thread_local int index = 0; return index; }

  private:
    struct alignas(64) Counter { std::atomic<int> taken{0}; };

    static int& phase_of_this_thread() { thread_local int phase = 0; return phase; }

    // The last to arrive resets the counters of the phase that ended; the next phase uses the others.
    void barrier(Counter* ended) {
        int generation = generation_.load(std::memory_order_acquire);
        phase_of_this_thread()++;
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size_ - 1) {
            for (int part = 0; part < size_; part++) ended[part].taken.store(0, std::memory_order_relaxed);
            arrived_.store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; generation_.load(std::memory_order_acquire) == generation;) {
            relax();
            if (++spins > 4000) { std::this_thread::yield(); spins = 0; }
        }
    }

    const int size_;
    std::vector<Counter> counters_;
    Counter* next_[2];
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
};

// The threads themselves: run(body) calls body(team) on all of them, the caller's included.
class Threads {
  public:
    explicit Threads(int size) : size_(size) {
        for (int index = 1; index < size; index++) threads_.emplace_back([this, index] { live(index); });
    }
    // In a child of fork there are none of the parent's threads, only their handles.
    bool alive() const { return process_ == getpid(); }
    ~Threads() {
        if (!alive()) {
            for (std::thread& thread : threads_) thread.detach();
            return;
        }
        stop_.store(true);
        wake();
        for (std::thread& thread : threads_) thread.join();
    }
    int size() const { return size_; }

    template <class Body> void run(Body& body) {
        Team team(size_);
        team_ = &team;
        body_ = &body;
        call_ = [](void* b, Team& t) { (*static_cast<Body*>(b))(t); };
        busy_.store(size_ - 1, std::memory_order_relaxed);
        if (size_ > 1) wake();
        team.join(0);
        body(team);
        while (busy_.load(std::memory_order_acquire)) relax();
    }

  private:
    void wake() {
        round_.fetch_add(1, std::memory_order_release);
        round_.notify_all();
    }

    void live(int index) {
        for (int seen = 0;;) {
            for (int spins = 0; spins < 4000 && round_.load(std::memory_order_acquire) == seen; spins++) relax();
            round_.wait(seen, std::memory_order_acquire);
            seen = round_.load(std::memory_order_acquire);
            if (stop_.load()) return;
            team_->join(index);
            call_(body_, *team_);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int size_;
    const pid_t process_ = getpid();
    std::vector<std::thread> threads_;
    std::atomic<int> round_{0};
    std::atomic<int> busy_{0};
    std::atomic<bool> stop_{false};
    Team* team_ = nullptr;
    void* body_ = nullptr;
    void (*call_)(void*, Team&) = nullptr;
};

}  // namespace kernels
