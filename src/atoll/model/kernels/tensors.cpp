// Memory for large tensors on the CPU, behind torch's own interface for allocators: one reservation of address space, of which the lowest hole that is
// large enough is taken, and into which neighbouring holes merge again.
//
// A training step takes and frees gigabytes in the same order each time. glibc either maps each block anew, and the kernel clears its pages, or keeps
// them in a heap that small objects (those of prepared products above all) cut into pieces, so that it grows with every step of another length. Here
// pages stay and small objects are elsewhere. Python calls this through ctypes (memory.py).

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

namespace {

constexpr size_t SMALLEST = size_t(128) << 10, LARGEST = size_t(256) << 20;  // bytes of what is served here; beyond, memory that is not there should be refused
constexpr size_t RESERVED = size_t(1) << 38, PAGE = 4096;

struct Region {
    std::mutex mutex;
    char* base = nullptr;
    size_t end = 0, highest = 0, live = 0;  // where the last taken block ends, and has ended since the last release; bytes that are taken
    std::map<size_t, size_t> holes, taken;  // offset: bytes; no two holes are neighbours, and none reaches the end

    bool reserve() {
        std::lock_guard<std::mutex> lock(mutex);
        if (base) return true;
        void* found = mmap(nullptr, RESERVED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) return false;
        base = static_cast<char*>(found);
        return true;
    }

    bool holds(const void* p) const { return p >= base && p < base + RESERVED; }

    void* take(size_t bytes) {
        bytes = (bytes + PAGE - 1) / PAGE * PAGE;
        std::lock_guard<std::mutex> lock(mutex);
        size_t at = end;
        auto hole = holes.begin();
        while (hole != holes.end() && hole->second < bytes) ++hole;
        if (hole != holes.end()) {
            at = hole->first;
            if (hole->second > bytes) holes.emplace(at + bytes, hole->second - bytes);
            holes.erase(hole);
        } else if (end + bytes > RESERVED) {
            return nullptr;
        } else {
            highest = std::max(highest, end += bytes);
        }
        taken.emplace(at, bytes);
        live += bytes;
        return base + at;
    }

    void give(void* p) {
        std::lock_guard<std::mutex> lock(mutex);
        auto block = taken.find(static_cast<char*>(p) - base);
        size_t at = block->first, bytes = block->second;
        taken.erase(block);
        live -= bytes;
        auto next = holes.lower_bound(at);
        if (next != holes.end() && next->first == at + bytes) bytes += next->second, next = holes.erase(next);
        if (next != holes.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == at) at = before->first, bytes += before->second, holes.erase(before);
        }
        if (at + bytes == end) end = at;
        else holes.emplace(at, bytes);
    }

    // The pages of all holes, and of what was taken beyond the end, go back to the system.
    void release() {
        std::lock_guard<std::mutex> lock(mutex);
        for (auto [at, bytes] : holes) madvise(base + at, bytes, MADV_DONTNEED);
        if (highest > end) madvise(base + end, highest - end, MADV_DONTNEED);
        highest = end;
    }
};

Region& region() {
    static Region* made = new Region;  // never destroyed: tensors may outlive every static
    return *made;
}

class Tensors final : public c10::Allocator {
    static c10::Allocator* small() { return c10::GetDefaultCPUAllocator(); }

    static void free(void* p) {
        if (region().holds(p)) region().give(p);
        else if (p) small()->raw_deallocate(p);
    }

  public:
    c10::DataPtr allocate(size_t bytes) override {
        void* p = bytes < SMALLEST || bytes > LARGEST ? nullptr : region().take(bytes);
        if (!p) p = small()->raw_allocate(bytes);
        return {p, p, &free, c10::Device(c10::kCPU)};
    }
    c10::DeleterFnPtr raw_deleter() const override { return &free; }
    void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

}  // namespace

extern "C" {

int atoll_tensors_interface() { return 1; }

// From now on, for the rest of the process. 1 if it could be done.
int atoll_tensors_begin() {
    static Tensors* tensors = nullptr;
    if (tensors) return 1;
    if (!region().reserve()) return 0;
    // a fork must not find the mutex taken by a thread that it does not have
    pthread_atfork([] { region().mutex.lock(); }, [] { region().mutex.unlock(); }, [] { region().mutex.unlock(); });
    tensors = new Tensors;
    c10::SetCPUAllocator(tensors, 0);
    return 1;
}

void atoll_tensors_release() { region().release(); }

// Bytes that tensors hold, and bytes up to the end of the last one: the difference is holes.
void atoll_tensors_bytes(size_t* found) {
    std::lock_guard<std::mutex> lock(region().mutex);
    found[0] = region().live, found[1] = region().end;
}

}  // extern "C"
