// A GPU's threadgroup on a processor: one fiber a thread, run in turns between barriers and simdgroup operations.
//
// What would go wrong silently on a GPU stops the program here: a barrier or simdgroup operation that not all threads
// reach, or reach at different lines; threadgroup memory read before it is written, or touched by two threads (one of
// them writing) without a barrier between; an index outside an array; an output written twice.
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
  int writer = -1, reader = -1;  // reader -2: several
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
inline void team_barrier(unsigned threads, int line) {
  if (threads == 0 || threads % SIMD || current->fibers.size() % threads || (current->team_threads && current->team_threads != threads)) {
    fail("teams of no whole simdgroups, or of several sizes", threads, current->team_threads);
  }
  current->team_threads = threads;
  fiber().team_barriers++;
  wait(Wait::team, line);
}

// Whether no barrier lies between the running thread and what another did; thread -2: any.
inline bool at_the_same_time(const Moment& then, int thread) {
  const Fiber& mine = fiber();
  unsigned threads = current->team_threads;
  bool same_team = threads == 0 || thread < 0 || unsigned(thread) / threads == thread_index() / threads;
  return thread != int(thread_index()) && then.barriers == mine.barriers &&
         (!same_team || then.team_barriers == mine.team_barriers);
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

// ---- memory

template <typename T>
class Device {
 public:
  using Value = std::remove_const_t<T>;
  Device(T* at, T* begin, T* end, unsigned char* written) : at_(at), begin_(begin), end_(end), written_(written) {}
  operator Device<const T>() const {
    return {at_, begin_, end_, written_};
  }
  Device operator+(std::ptrdiff_t by) const {
    return {at_ + by, begin_, end_, written_};
  }

  class Reference {
   public:
    explicit Reference(const Device& from) : from_(from) {}
    void operator=(Value value) const {
      unsigned char& flag = from_.written_[from_.at_ - from_.begin_];
      if (flag) {
        fail("an output is written twice", from_.at_ - from_.begin_);
      }
      flag = 1;
      *from_.at_ = value;
    }

   private:
    Device from_;
  };

  auto operator[](std::ptrdiff_t index) const {
    Device there = *this + index;
    there.check(sizeof(T));
    if constexpr (std::is_const_v<T>) {
      return *there.at_;
    } else {
      return Reference(there);
    }
  }

  // The same memory as other values, which are only read.
  template <typename V>
  Device<V> over() const {
    return {reinterpret_cast<V*>(at_), reinterpret_cast<V*>(begin_), reinterpret_cast<V*>(end_), written_};
  }

  template <typename V>
  V as() const {
    check(sizeof(V));
    if (reinterpret_cast<std::uintptr_t>(at_) % sizeof(V)) {
      fail("a vector is read at an address that its size does not divide", at_ - begin_);
    }
    V value;
    std::memcpy(&value, at_, sizeof value);
    return value;
  }

 private:
  void check(std::size_t bytes) const {
    if (at_ < begin_ || reinterpret_cast<const char*>(at_) + bytes > reinterpret_cast<const char*>(end_)) {
      fail("an index outside a device array (index, size)", at_ - begin_, end_ - begin_);
    }
  }
  T *at_, *begin_, *end_;
  unsigned char* written_;
};

template <typename T>
class Shared {
 public:
  Shared(Block* block, std::ptrdiff_t offset) : block_(block), offset_(offset) {}
  Shared operator+(std::ptrdiff_t by) const {
    return {block_, offset_ + by};
  }

  class Reference {
   public:
    Reference(Block* block, std::ptrdiff_t index) : block_(block), index_(index) {}
    operator T() const {
      Touch& touch = block_->touches[index_];
      int me = int(thread_index());
      if (!touch.written) {
        fail("threadgroup memory is read before it is written (index, thread)", index_, me);
      }
      if (at_the_same_time(touch.write, touch.writer)) {
        fail("a race: threadgroup memory is read without a barrier after its writing (index, thread)", index_, me);
      }
      touch.reader = touch.reader != -1 && at_the_same_time(touch.read, touch.reader) ? -2 : me;
      touch.read = now();
      return value();
    }
    void operator=(T value) const {
      Touch& touch = block_->touches[index_];
      int me = int(thread_index());
      if (touch.written && at_the_same_time(touch.write, touch.writer)) {
        fail("a race: two threads write one place of threadgroup memory (index, thread)", index_, me);
      }
      if (touch.reader != -1 && at_the_same_time(touch.read, touch.reader)) {
        fail("a race: threadgroup memory is written without a barrier after its reading (index, thread)", index_, me);
      }
      if (touch.held) {
        fail("a race: threadgroup memory is written that products still read (index, thread)", index_, me);
      }
      touch.written = true;
      touch.writer = me;
      touch.write = now();
      std::memcpy(block_->bytes.data() + index_ * sizeof(T), &value, sizeof(T));
    }

   private:
    T value() const {
      T out;
      std::memcpy(&out, block_->bytes.data() + index_ * sizeof(T), sizeof(T));
      return out;
    }
    Block* block_;
    std::ptrdiff_t index_;
  };

  Touch* touch(std::ptrdiff_t index) const {
    return &block_->touches[offset_ + index];
  }

  Reference operator[](std::ptrdiff_t index) const {
    std::ptrdiff_t there = offset_ + index;
    if (there < 0 || there >= std::ptrdiff_t(block_->touches.size())) {
      fail("an index outside a threadgroup array (index, size)", there, long(block_->touches.size()));
    }
    return {block_, there};
  }

 private:
  Block* block_;
  std::ptrdiff_t offset_;
};

template <typename T>
Shared<T> shared_array(std::size_t size) {
  unsigned which = fiber().arrays++;
  if (which == current->blocks.size()) {
    current->shared_bytes += size * sizeof(T);
    if (current->shared_bytes > MOST_SHARED_BYTES) {
      fail("more threadgroup memory than Metal has (bytes, limit)", long(current->shared_bytes), MOST_SHARED_BYTES);
    }
    current->blocks.push_back(std::make_unique<Block>());
    current->blocks.back()->bytes.assign(size * sizeof(T), char(0xff));
    current->blocks.back()->touches.resize(size);
  }
  return {current->blocks[which].get(), 0};
}

// An array of the memory that a launch on an NVIDIA GPU asks for, beyond Metal's limit.
template <typename T>
Shared<T> large_array(std::size_t size) {
  Shared<T> array = shared_array<T>(0);
  Block& block = *current->blocks[fiber().arrays - 1];
  if (block.touches.empty()) {
    block.bytes.assign(size * sizeof(T), char(0xff));
    block.touches.resize(size);
  }
  return array;
}

// ---- products in the background

inline void begin_product(Product product) {
  for (Touch* touch : product.held) {
    touch->held++;
  }
  product.group = fiber().product_groups;
  fiber().products.push_back(std::move(product));
}

// Adds the products of all groups but the last `left`.
inline void finish_products(unsigned left) {
  std::vector<Product> others;
  for (Product& product : fiber().products) {
    if (product.group + left >= fiber().product_groups) {
      others.push_back(std::move(product));
      continue;
    }
    for (std::size_t i = 0; i < product.added.size(); i++) {
      product.sums[i] += product.added[i];
    }
    for (Touch* touch : product.held) {
      touch->held--;
    }
  }
  fiber().products = std::move(others);
}

// Stops where a product that is not done reads a register in these bytes.
inline void check_registers(const void* from, std::size_t bytes) {
  for (const Product& product : fiber().products) {
    auto at = static_cast<const char*>(product.operand) - static_cast<const char*>(from);
    if (at >= 0 && std::size_t(at) < bytes) {
      fail("registers are written that products still read (thread)", thread_index());
    }
  }
}

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
