// A GPU's threadgroup on a processor: one fiber a thread, run in turns between barriers and simdgroup operations.
//
// What would go wrong silently on a GPU stops the program here: a barrier or simdgroup operation that not all threads of a
// threadgroup, team or simdgroup reach, or reach at different lines; threadgroup memory read before it is written, or
// touched by two threads (one of them writing) without a barrier between; memory or registers written that products in the
// background still read; an index outside an array; an output written twice. Arrays that begin at the same place of an
// NVIDIA GPU's memory lie apart here: that one is still in use when the next is written does not show.
#pragma once

#include "products.h"

namespace emulator {

// ---- the scheduler

inline void enter() {
  current->body();
  if (!fiber().products.empty()) {
    fail("products are begun that nobody waits for (thread)", thread_index());
  }
  fiber().wait = Wait::done;
  fiber().line = 0;  // simdgroups may differ in what they did last
  swapcontext(&fiber().context, &current->scheduler);
}

// Whether every thread from `first` to `end` waits for the same thing at the same line.
inline bool together(const Group& group, unsigned first, unsigned end) {
  const Fiber& one = group.fibers[first];
  for (unsigned i = first; i < end; i++) {
    const Fiber& other = group.fibers[i];
    bool same_simdgroup = i / SIMD == first / SIMD;
    if (other.wait != one.wait || other.line != one.line || other.barriers != one.barriers ||
        (same_simdgroup && (other.exchanges != one.exchanges || other.lookups != one.lookups))) {
      return false;
    }
  }
  return true;
}

inline bool may_run(const Group& group, unsigned index, bool all_together) {
  const Fiber& one = group.fibers[index];
  unsigned first = index / SIMD * SIMD;
  unsigned team = one.wait == Wait::team ? index / group.team_threads * group.team_threads : 0;
  return one.wait == Wait::none || (one.wait == Wait::barrier && all_together) ||
         (one.wait == Wait::team && together(group, team, team + group.team_threads)) ||
         (one.wait == Wait::simdgroup && together(group, first, first + SIMD));
}

inline void run_group(Group& group) {
  const unsigned threads = unsigned(group.fibers.size());
  for (;;) {
    bool all_together = together(group, 0, threads);
    if (all_together && group.fibers[0].wait == Wait::done) {
      return;
    }
    std::vector<unsigned> ready;
    for (unsigned i = 0; i < threads; i += SIMD) {
      if (may_run(group, i, all_together)) {
        for (unsigned j = i; j < i + SIMD; j++) {
          if (group.fibers[j].wait != Wait::done) {
            ready.push_back(j);
          }
        }
      }
    }
    if (ready.empty()) {
      for (unsigned i = 0; i < threads; i++) {
        const Fiber& one = group.fibers[i];
        std::fprintf(stderr, "thread %u waits for %d at line %d after %u barriers, %u exchanges, %u look-ups\n", i,
                     int(one.wait), one.line, one.barriers, one.exchanges, one.lookups);
      }
      fail("not every thread reaches a barrier or simdgroup operation, or not the same one (line)", group.fibers[0].line);
    }
    for (unsigned index : ready) {
      group.running = index;
      group.fibers[index].wait = Wait::none;
      swapcontext(&group.scheduler, &group.fibers[index].context);
    }
  }
}

inline void launch(Position groups, unsigned threads, const std::function<void()>& body) {
  if (threads > MOST_THREADS || threads % SIMD) {
    fail("a threadgroup of more threads than Metal has, or of no whole simdgroups", threads, MOST_THREADS);
  }
  std::vector<std::unique_ptr<char[]>> stacks(threads);
  for (auto& stack : stacks) {
    stack = std::make_unique<char[]>(STACK_BYTES);
  }
  for (unsigned y = 0; y < groups.y; y++) {
    for (unsigned x = 0; x < groups.x; x++) {
      Group group;
      group.position = {x, y, 0};
      group.count = {groups.x, groups.y, 1};
      group.fibers.resize(threads);
      group.exchanges.resize(threads / SIMD);
      group.body = body;
      current = &group;
      for (unsigned i = 0; i < threads; i++) {
        Fiber& one = group.fibers[i];
        getcontext(&one.context);
        one.context.uc_stack.ss_sp = stacks[i].get();
        one.context.uc_stack.ss_size = STACK_BYTES;
        one.context.uc_link = &group.scheduler;
        makecontext(&one.context, enter, 0);
      }
      run_group(group);
    }
  }
}

// ---- what a test passes: arrays in a file, and back

struct Array {
  std::vector<int> shape;
  std::size_t size = 0, n_bytes = 0;
  std::unique_ptr<char[]> bytes;  // exactly as long as the array, for AddressSanitizer
  std::vector<unsigned char> written;
};

struct Arguments {
  Position groups{};
  unsigned threads = 0;
  std::vector<Array> arrays;

  template <typename T>
  Device<T> at(std::size_t index) {
    Array& array = arrays.at(index);
    T* begin = reinterpret_cast<T*>(array.bytes.get());
    return {begin, begin, begin + array.size, array.written.data()};
  }
  const int* shape(std::size_t index) const {
    return arrays.at(index).shape.data();
  }
};

inline std::int32_t read_int() {
  std::int32_t value = 0;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) {
    fail("the request ends early");
  }
  return value;
}

// Reads: variant, groups x y, threads, then for each array rank, shape, bytes a value, and its bytes.
inline int main(const std::vector<void (*)(Arguments&)>& variants) {
  unsigned variant = unsigned(read_int());
  Arguments arguments;
  arguments.groups.x = unsigned(read_int());
  arguments.groups.y = unsigned(read_int());
  arguments.threads = unsigned(read_int());
  int n_inputs = read_int(), n_arrays = read_int();
  for (int i = 0; i < n_arrays; i++) {
    Array array;
    array.size = 1;
    for (int axes = read_int(); axes > 0; axes--) {
      array.shape.push_back(read_int());
      array.size *= std::size_t(array.shape.back());
    }
    std::size_t bytes = array.n_bytes = array.size * std::size_t(read_int());
    array.bytes = std::make_unique<char[]>(bytes);
    array.written.resize(array.size);
    if (bytes && std::fread(array.bytes.get(), 1, bytes, stdin) != bytes) {
      fail("the request ends early");
    }
    arguments.arrays.push_back(std::move(array));
  }
  variants.at(variant)(arguments);
  for (int i = n_inputs; i < n_arrays; i++) {
    const Array& array = arguments.arrays[i];
    std::fwrite(array.bytes.get(), 1, array.n_bytes, stdout);
  }
  return 0;
}

} // namespace emulator
