// Between the dispatcher (native.cpp) and the kernels (scan_isa.cpp, compiled once per instruction set).
//
// A call is split over channel groups (one SIMD vector of channels each) and over the batch. What one group computes
// never depends on the split, and the sums over groups (dB, dC) and over the batch (dA, dD, ddt_bias) are taken in
// index order: results are the same bits for every number of threads.
#ifndef MEDMAMBA_KERNELS_H
#define MEDMAMBA_KERNELS_H

#include <stdint.h>

#include "medmamba_native.h"

namespace medmamba {

// Tokens between two checkpoints of the state; also the unit in which tokens are gathered from the volume.
constexpr int kBlock = 64;

// One slot of the ring through which the members of a team hand over their channels' share of dB and dC.
struct RingSlot {
    int64_t arrived;   // members that have written their share of the block now in the slot
    int64_t completed; // blocks that have passed through the slot
    char pad[48];      // one cache line: members write these words concurrently
};

// What one thread does: batch items [batch_begin, batch_end), channel groups [group_begin, group_end).
// The threads of a team share the batch items and divide the groups.
struct Member {
    int64_t batch_begin, batch_end;
    int64_t group_begin, group_end;
    int64_t team_size;
    void *scratch; // private to the member, 64-byte aligned
    void *ring;    // shared by the team: ring_slots x slot_bytes
    RingSlot *ring_state;
    int64_t ring_slots;
    void *sums; // shared by all: sums_bytes, zeroed
    bool bad_step; // out: the forward met a step size that is negative, NaN or infinite
};

struct Kernels {
    const char *name;
    int64_t (*groups)(const medmamba_scan &);
    int64_t (*forward_scratch)(const medmamba_scan &, int64_t groups_per_member);
    int64_t (*backward_scratch)(const medmamba_scan &, int64_t groups_per_member);
    int64_t (*slot_bytes)(const medmamba_scan &);
    int64_t (*sums_bytes)(const medmamba_scan &);
    void (*forward)(const medmamba_scan &, Member &);
    void (*backward)(const medmamba_scan &, Member &);
    // dA, dD, ddt_bias from the sums, after all members have returned.
    void (*finish_backward)(const medmamba_scan &, const void *sums);
};

// Called again and again by a member that finds the ring full; `attempt` counts the calls. Lives in the dispatcher so
// that the kernels' objects contain no library code (a COMDAT function compiled for AVX-512 must not win at link time).
void wait_for_team(int attempt);

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

} // namespace medmamba

#endif
