// Entry points of the library: checks, choice of the instruction set, division of the work, threads.

#include "kernels.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace medmamba {

void wait_for_team(int attempt) {
    // The others are computing, not blocked: yield, and sleep only when the machine is oversubscribed.
    if (attempt < 1000)
        std::this_thread::yield();
    else
        std::this_thread::sleep_for(std::chrono::microseconds(50));
}

namespace {

// --- instruction set ---------------------------------------------------------------------------------------------

bool supported(const Kernels &kernels) {
#if defined(MEDMAMBA_X86)
    __builtin_cpu_init();
    if (&kernels == &kernels_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
    if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kernels_baseline;
}

const Kernels *choose() {
    const Kernels *const all[] = {
#if defined(MEDMAMBA_X86)
        &kernels_avx512, &kernels_avx2,
#endif
        &kernels_baseline};
    const char *wanted = std::getenv("MEDMAMBA_NATIVE_ISA");
    for (const Kernels *kernels : all)
        if ((!wanted || !*wanted || std::strcmp(wanted, kernels->name) == 0) && supported(*kernels)) return kernels;
    return nullptr;
}

const Kernels *active() {
    static const Kernels *const chosen = choose();
    return chosen;
}

// --- checks ------------------------------------------------------------------------------------------------------

bool product_fits(std::initializer_list<int64_t> factors) {
    int64_t product = 16; // bytes of the largest element, and room for padding to a vector
    for (int64_t f : factors)
        if (__builtin_mul_overflow(product, f > 0 ? f : 1, &product)) return false;
    return true;
}

int32_t check_sizes(const medmamba_scan *s) {
    if (!s || s->struct_size != int64_t(sizeof(medmamba_scan))) return MEDMAMBA_BAD_STRUCT;
    if (s->batch < 0 || s->length < 0 || s->channels < 0 || s->routes < 1 || s->states < 1) return MEDMAMBA_BAD_SIZE;
    if (s->length > INT32_MAX || s->states > (int64_t(1) << 20)) return MEDMAMBA_BAD_SIZE;
    if (s->channels > INT64_MAX / 64) return MEDMAMBA_BAD_SIZE;
    if (!product_fits({s->batch, s->length + kBlock, s->routes, s->channels + 16, s->states + 16}))
        return MEDMAMBA_BAD_SIZE;
    if (s->heads < 0 || (s->heads > 0 && s->channels % s->heads != 0)) return MEDMAMBA_BAD_SIZE;
    if (s->rank < 0 || (s->rank > 0 && s->heads > 0)) return MEDMAMBA_BAD_SIZE;
    if (!product_fits({s->routes, s->channels + 16, s->rank})) return MEDMAMBA_BAD_SIZE;
    if (s->dtype < 0 || s->dtype > 1 || s->merge < 0 || s->merge > 1 || s->threads < 1) return MEDMAMBA_BAD_OPTION;
    return MEDMAMBA_OK;
}

bool usable(const void *pointer, size_t alignment, bool required) {
    if (!pointer) return !required;
    return reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

int32_t check_order(const medmamba_scan &s) {
    uint32_t largest = 0; // a negative index is a large unsigned one
    for (int64_t i = 0; i < s.routes * s.length; ++i) {
        const uint32_t token = uint32_t(s.order[i]);
        largest = token > largest ? token : largest;
    }
    return int64_t(largest) < s.length ? MEDMAMBA_OK : MEDMAMBA_BAD_ORDER;
}

bool is_empty(const medmamba_scan &s) { return s.batch == 0 || s.length == 0 || s.channels == 0; }

int32_t check_arrays(const medmamba_scan &s, bool backward) {
    const size_t element = s.dtype == 0 ? sizeof(float) : sizeof(double);
    for (const void *p : {s.x, s.dt, s.A, s.B, s.C})
        if (!usable(p, element, true)) return MEDMAMBA_BAD_POINTER;
    for (const void *p : {s.D, s.dt_bias, (const void *)s.final_state, s.dfinal_state})
        if (!usable(p, element, false)) return MEDMAMBA_BAD_POINTER;
    if (!usable(s.dt_weight, element, s.rank > 0)) return MEDMAMBA_BAD_POINTER;
    if (!usable(s.order, sizeof(int32_t), true)) return MEDMAMBA_BAD_POINTER;
    if (!backward && (!usable(s.y, element, true) || !usable(s.checkpoint, element, false)))
        return MEDMAMBA_BAD_POINTER;
    if (backward) {
        for (const void *p : {(const void *)s.checkpoint, s.dy, (const void *)s.dx, (const void *)s.ddt,
                              (const void *)s.dA, (const void *)s.dB, (const void *)s.dC})
            if (!usable(p, element, true)) return MEDMAMBA_BAD_POINTER;
        for (const void *p : {s.dD, s.ddt_bias})
            if (!usable(p, element, false)) return MEDMAMBA_BAD_POINTER;
        if (!usable(s.ddt_weight, element, s.rank > 0)) return MEDMAMBA_BAD_POINTER;
    }
    return check_order(s);
}

// --- work --------------------------------------------------------------------------------------------------------

struct FreeDeleter {
    void operator()(char *p) const { ::operator delete(p, std::align_val_t(64)); }
};
typedef std::unique_ptr<char, FreeDeleter> Memory;

Memory allocate(int64_t bytes) {
    return Memory(static_cast<char *>(::operator new(size_t(bytes > 0 ? bytes : 64), std::align_val_t(64))));
}

struct Division {
    int64_t teams, team_size;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Teams of equal size; each takes a share of the batch and divides the channel groups among its members.
Division divide(int64_t threads, int64_t batch, int64_t groups) {
    Division best = {1, 1};
    int64_t least = batch * groups;
    for (int64_t teams = 1; teams <= threads && teams <= batch; ++teams) {
        const int64_t size = threads / teams < groups ? threads / teams : groups;
        const int64_t longest = ceil_div(batch, teams) * ceil_div(groups, size);
        // At equal length more teams are better: they do not wait for one another.
        if (longest < least || (longest == least && teams * size > 1)) {
            least = longest;
            best = {teams, size};
        }
    }
    return best;
}

// Threads for a call of this size: one per half millisecond of work, and none below a millisecond.
int64_t thread_count(const medmamba_scan &s, bool backward) {
    const double ns = double(s.batch) * double(s.length) * double(s.routes) * double(s.channels) *
                      (1.0 + (s.heads > 0 ? 0.08 : 0.25) * double(s.states)) * (backward ? 2.5 : 1.0);
    const double worth = ns / 0.5e6;
    if (worth < 2) return 1;
    return worth < double(s.threads) ? int64_t(worth) : s.threads;
}

// The OpenMP runtime of the host program, if it handed one over. Its workers spin for a while after every parallel
// region of the host; threads of our own would fight them for the cores (measured: no gain at all from a second one).
struct OpenMP {
    medmamba_parallel_function parallel = nullptr;
    medmamba_int_function thread_number = nullptr, thread_count = nullptr;
} openmp;

template <class Task> struct Team {
    const Task *task;
    int64_t count;
    bool complete; // written by the first member only
};

template <class Task> void join_team(void *argument) {
    Team<Task> &team = *(Team<Task> *)argument;
    // Members may wait for each other, so a smaller team than asked for (nested regions, a thread limit) must not start.
    // All see the same number: they all work, or all leave.
    if (openmp.thread_count() != team.count) return;
    const int member = openmp.thread_number();
    if (member == 0) team.complete = true;
    (*team.task)(member);
}

// Runs task(0..count-1) at the same time on the host's OpenMP threads. False if there are not enough; then no task ran.
template <class Task> bool run_on_openmp(int64_t count, const Task &task) {
    if (!openmp.parallel) return false;
    Team<Task> team{&task, count, false};
    openmp.parallel(&join_team<Task>, &team, unsigned(count), 0);
    return team.complete;
}

// The same on threads started for this call. False if one could not be started; then no task has run.
template <class Task> bool run_on_threads(int64_t count, const Task &task) {
    enum { kWait, kGo, kCancel };
    std::atomic<int> gate{kWait};
    std::vector<std::thread> threads;
    bool started = true;
    try {
        threads.reserve(size_t(count - 1));
        for (int64_t i = 1; i < count; ++i)
            threads.emplace_back([&gate, &task, i] {
                int state;
                while ((state = gate.load(std::memory_order_acquire)) == kWait) std::this_thread::yield();
                if (state == kGo) task(i);
            });
    } catch (...) {
        started = false;
    }
    gate.store(started ? kGo : kCancel, std::memory_order_release);
    if (started) task(0);
    for (std::thread &thread : threads) thread.join();
    return started;
}

template <class Task> bool run_all(int64_t count, const Task &task) {
    if (count > 1) return run_on_openmp(count, task) || run_on_threads(count, task);
    task(0);
    return true;
}

int32_t run(const medmamba_scan &s, const Kernels &kernels, bool backward, int64_t max_threads) {
    const int64_t groups = kernels.groups(s);
    const Division division = divide(max_threads, s.batch, groups);
    const int64_t count = division.teams * division.team_size;
    const int64_t per_member = ceil_div(groups, division.team_size);
    const int64_t scratch = backward ? kernels.backward_scratch(s, per_member) : kernels.forward_scratch(s, per_member);
    // Slots for a team of one only hold the block at hand; larger teams drift apart by up to this many blocks.
    const int64_t slots = backward ? (division.team_size > 1 ? 8 : 1) : 0;
    const int64_t slot = backward ? kernels.slot_bytes(s) : 0;
    const int64_t sums = backward ? kernels.sums_bytes(s) : 0;

    const Memory scratch_memory = allocate(count * scratch);
    const Memory ring_memory = allocate(division.teams * slots * slot);
    const Memory sums_memory = allocate(sums);
    std::vector<RingSlot> ring_state(size_t(division.teams * slots));
    std::vector<Member> members{size_t(count)};
    std::memset(sums_memory.get(), 0, size_t(sums));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t team = i / division.team_size, place = i % division.team_size;
        Member &m = members[size_t(i)];
        m.batch_begin = s.batch * team / division.teams;
        m.batch_end = s.batch * (team + 1) / division.teams;
        m.group_begin = groups * place / division.team_size;
        m.group_end = groups * (place + 1) / division.team_size;
        m.team_size = division.team_size;
        m.scratch = scratch_memory.get() + i * scratch;
        m.ring = ring_memory.get() + team * slots * slot;
        m.ring_state = ring_state.data() + team * slots;
        m.ring_slots = slots;
        m.sums = sums_memory.get();
        m.bad_step = false;
    }
    const bool ran = run_all(count, [&](int64_t i) {
        backward ? kernels.backward(s, members[size_t(i)]) : kernels.forward(s, members[size_t(i)]);
    });
    if (!ran) return run(s, kernels, backward, 1);
    if (backward) kernels.finish_backward(s, sums_memory.get());
    for (const Member &m : members)
        if (m.bad_step) return MEDMAMBA_BAD_STEP;
    return MEDMAMBA_OK;
}

// Fresh arrays of hundreds of megabytes cost a page fault per 4 KiB, which threads take one after the other; huge pages
// need one in 512. Only whole huge pages inside the array are advised: no memory is added.
void advise_huge_pages(const void *array, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = uintptr_t(2) << 20;
    if (!array || bytes < int64_t(4 * page)) return;
    const uintptr_t begin = (uintptr_t(array) + page - 1) / page * page;
    const uintptr_t end = (uintptr_t(array) + uintptr_t(bytes)) / page * page;
    madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)array, (void)bytes;
#endif
}

int64_t checkpoint_size(const medmamba_scan &s) {
    // The same for every instruction set: channels padded to the widest vector.
    const int64_t blocks = (s.length + kBlock - 1) / kBlock;
    return s.batch * s.routes * blocks * s.states * ((s.channels + 15) / 16 * 16);
}

void advise_outputs(const medmamba_scan &s, bool backward) {
    const int64_t element = s.dtype == 0 ? sizeof(float) : sizeof(double);
    const int64_t tokens = s.batch * s.length * element, steps = s.rank > 0    ? s.rank
                                                                                    : s.heads > 0 ? s.heads
                                                                                                  : s.channels;
    if (backward) {
        advise_huge_pages(s.dx, tokens * s.channels);
        advise_huge_pages(s.ddt, tokens * s.routes * steps);
        advise_huge_pages(s.dB, tokens * s.routes * s.states);
        advise_huge_pages(s.dC, tokens * s.routes * s.states);
    } else {
        advise_huge_pages(s.y, tokens * s.channels * (s.merge == 0 ? 1 : s.routes));
        advise_huge_pages(s.checkpoint, checkpoint_size(s) * element);
    }
}

// With no sample, token or channel nothing is summed: every gradient or final state that has elements at all is zero.
void zero_gradients(const medmamba_scan &s) {
    const size_t element = s.dtype == 0 ? sizeof(float) : sizeof(double);
    const size_t parameters = size_t(s.routes * s.channels) * element;
    const size_t steps = s.heads > 0 ? size_t(s.routes * s.heads) * element : parameters;
    const size_t weights = size_t(s.batch * s.length * s.routes * s.states) * element;
    if (s.dA) std::memset(s.dA, 0, s.heads > 0 ? steps : parameters * size_t(s.states));
    if (s.dD) std::memset(s.dD, 0, parameters);
    if (s.ddt_bias) std::memset(s.ddt_bias, 0, steps);
    if (s.ddt_weight) std::memset(s.ddt_weight, 0, parameters * size_t(s.rank));
    if (s.rank > 0 && s.ddt) std::memset(s.ddt, 0, size_t(s.batch * s.length * s.routes * s.rank) * element);
    if (s.dB) std::memset(s.dB, 0, weights);
    if (s.dC) std::memset(s.dC, 0, weights);
}

int32_t call(const medmamba_scan *s, bool backward) {
    const Kernels *kernels = active();
    if (!kernels) return MEDMAMBA_ISA_UNAVAILABLE;
    if (int32_t status = check_sizes(s)) return status;
    if (is_empty(*s)) {
        if (backward) zero_gradients(*s);
        const size_t element = s->dtype == 0 ? sizeof(float) : sizeof(double);
        if (!backward && s->final_state)
            std::memset(s->final_state, 0, size_t(s->batch * s->routes * s->channels * s->states) * element);
        return MEDMAMBA_OK;
    }
    if (int32_t status = check_arrays(*s, backward)) return status;
    advise_outputs(*s, backward);
    try {
        return run(*s, *kernels, backward, thread_count(*s, backward));
    } catch (...) {
        return MEDMAMBA_OUT_OF_MEMORY;
    }
}

} // namespace
} // namespace medmamba

extern "C" {

int32_t medmamba_abi_version(void) { return MEDMAMBA_ABI_VERSION; }

void medmamba_use_openmp(medmamba_parallel_function parallel, medmamba_int_function thread_number,
                         medmamba_int_function thread_count) {
    medmamba::openmp = {parallel, thread_number, thread_count};
}

const char *medmamba_isa(void) {
    const medmamba::Kernels *kernels = medmamba::active();
    return kernels ? kernels->name : nullptr;
}

const char *medmamba_status_text(int32_t status) {
    switch (status) {
    case MEDMAMBA_OK: return "ok";
    case MEDMAMBA_BAD_STRUCT: return "library and loader are from different versions; reinstall medmamba";
    case MEDMAMBA_BAD_SIZE: return "a size is negative, zero where it must not be, or too large to address";
    case MEDMAMBA_BAD_OPTION: return "dtype, merge or the number of threads is out of range";
    case MEDMAMBA_BAD_POINTER: return "an array is missing or not aligned to its element type";
    case MEDMAMBA_BAD_ORDER: return "the order table holds an index outside 0..L-1";
    case MEDMAMBA_OUT_OF_MEMORY: return "scratch memory could not be allocated";
    case MEDMAMBA_BAD_STEP: return "a step size dt is negative, NaN or infinite";
    case MEDMAMBA_ISA_UNAVAILABLE: return "MEDMAMBA_NATIVE_ISA names an instruction set that is missing here";
    default: return "unknown status";
    }
}

int64_t medmamba_scan_checkpoint_size(const medmamba_scan *scan) {
    if (medmamba::check_sizes(scan) != MEDMAMBA_OK) return -1;
    return medmamba::checkpoint_size(*scan);
}

int32_t medmamba_scan_forward(const medmamba_scan *scan) { return medmamba::call(scan, false); }

int32_t medmamba_scan_backward(const medmamba_scan *scan) { return medmamba::call(scan, true); }

} // extern "C"
