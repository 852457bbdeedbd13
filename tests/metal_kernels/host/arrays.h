// Arrays of a device and of a threadgroup, which stop the program where a thread may not touch them.
#pragma once

#include "fibers.h"

namespace emulator {

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
      if (touch.writer != me && at_the_same_time(touch.write, touch.writer)) {
        fail("a race: threadgroup memory is read without a barrier after its writing (index, thread)", index_, me);
      }
      bool also = read_meanwhile(touch);
      touch.teams_read = also && (touch.teams_read || !in_my_team(touch.reader));
      touch.others_read = also && (touch.others_read || touch.reader != me);
      touch.reader = me;
      touch.read = now();
      return value();
    }
    void operator=(T value) const {
      Touch& touch = block_->touches[index_];
      int me = int(thread_index());
      if (touch.written && touch.writer != me && at_the_same_time(touch.write, touch.writer)) {
        fail("a race: two threads write one place of threadgroup memory (index, thread)", index_, me);
      }
      if (read_meanwhile(touch) && (touch.others_read || touch.reader != me)) {
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

} // namespace emulator
