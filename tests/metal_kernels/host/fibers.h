// The threads of a threadgroup, one fiber each, and where they wait for each other.
#pragma once

#include <ucontext.h>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

namespace emulator {

constexpr unsigned SIMD = 32, MOST_THREADS = 1024, MOST_SHARED_BYTES = 32768, STACK_BYTES = 256 << 10;

struct Position {
  unsigned x, y, z;
};

[[noreturn]] inline void fail(const char* what, long one = 0, long two = 0) {
  std::fflush(stdout);
  std::fprintf(stderr, "emulator: %s (%ld, %ld)\n", what, one, two);
  std::_Exit(3);
}

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16 {
  std::uint16_t bits = 0;
  bfloat16() = default;
  explicit bfloat16(float value) {
    std::uint32_t full = bits_as<std::uint32_t>(value);
    bits = std::isnan(value) ? 0x7fc0 : std::uint16_t((full + 0x7fffu + ((full >> 16) & 1u)) >> 16);
  }
  explicit operator float() const {
    return bits_as<float>(std::uint32_t(bits) << 16);
  }
};

enum class Wait { none, barrier, team, simdgroup, done };

struct Touch;

// What a product in the background adds to sums, and what it reads until it is done.
struct Product {
  float* sums;
  std::vector<float> added;
  const void* operand;
  std::vector<Touch*> held;
  unsigned group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::none;
  int line = 0;
  unsigned barriers = 0, team_barriers = 0, exchanges = 0, lookups = 0, arrays = 0;
  std::vector<Product> products;
  unsigned product_groups = 0;
};

struct Exchange {
  alignas(16) std::array<std::array<unsigned char, 64>, SIMD> slots;
};

// When a thread did something: after so many barriers of all threads, and of its team.
struct Moment {
  unsigned barriers = 0, team_barriers = 0;
};

// A value of threadgroup memory and who touched it last.
struct Touch {
  bool written = false;
  Moment write, read;
  int writer = -1, reader = -1;
  bool others_read = false, teams_read = false;  // beside the reader, meanwhile; of several teams
  unsigned held = 0;  // by products that are not done
};

struct Block {
  std::vector<char> bytes;
  std::vector<Touch> touches;
};

struct Group {
  Position position{}, count{};
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<std::array<Exchange, 2>> exchanges;
  std::vector<std::unique_ptr<Block>> blocks;
  std::size_t shared_bytes = 0;
  unsigned running = 0, team_threads = 0;
  std::function<void()> body;
};

inline Group* current = nullptr;

inline Fiber& fiber() {
  return current->fibers[current->running];
}

inline unsigned thread_index() {
  return current->running;
}

inline Position group_position() {
  return current->position;
}

inline Position group_count() {
  return current->count;
}

inline void wait(Wait why, int line) {
  Fiber& mine = fiber();
  mine.wait = why;
  mine.line = line;
  swapcontext(&mine.context, &current->scheduler);
}

inline void barrier(int line) {
  fiber().barriers++;
  wait(Wait::barrier, line);
}

// Of the running thread's team: threads beside each other, as many in each.
inline void team_barrier(unsigned threads, unsigned number, int line) {
  if (threads == 0 || threads % SIMD || current->fibers.size() % threads ||
      (current->team_threads && current->team_threads != threads)) {
    fail("teams of no whole simdgroups, or of several sizes", threads, current->team_threads);
  }
  if (number != thread_index() / threads) {
    fail("a team waits at another's barrier (team, barrier)", thread_index() / threads, number);
  }
  current->team_threads = threads;
  fiber().team_barriers++;
  wait(Wait::team, line);
}

inline bool in_my_team(int thread) {
  unsigned threads = current->team_threads;
  return threads == 0 || unsigned(thread) / threads == thread_index() / threads;
}

// Whether no barrier lies between the running thread and what `thread` did then.
inline bool at_the_same_time(const Moment& then, int thread) {
  return then.barriers == fiber().barriers && (!in_my_team(thread) || then.team_barriers == fiber().team_barriers);
}

// Whether no barrier lies between the running thread and the last that read.
inline bool read_meanwhile(const Touch& touch) {
  return touch.reader != -1 &&
         (touch.teams_read ? touch.read.barriers == fiber().barriers : at_the_same_time(touch.read, touch.reader));
}

inline Moment now() {
  return {fiber().barriers, fiber().team_barriers};
}

template <typename T>
const std::array<T, SIMD> exchange(const T& value, int line) {
  static_assert(sizeof(T) <= 64 && std::is_trivially_copyable_v<T>);
  unsigned me = thread_index();
  Exchange& here = current->exchanges[me / SIMD][fiber().exchanges % 2];
  std::memcpy(here.slots[me % SIMD].data(), &value, sizeof value);
  fiber().exchanges++;
  wait(Wait::simdgroup, line);
  std::array<T, SIMD> all;
  for (unsigned i = 0; i < SIMD; i++) {
    std::memcpy(&all[i], here.slots[i].data(), sizeof(T));
  }
  return all;
}

// What lane `lane` put in `all`; all lanes of a simdgroup must look up as often until they meet again.
template <typename T>
T looked_up(const std::array<T, SIMD>& all, unsigned lane) {
  fiber().lookups++;
  if (lane >= SIMD) {
    fail("a lane that is none is looked up (lane)", lane);
  }
  return all[lane];
}

} // namespace emulator
