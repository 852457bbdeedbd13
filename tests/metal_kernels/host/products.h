// Products in the background, which end when they are waited for.
#pragma once

#include "arrays.h"

namespace emulator {

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

} // namespace emulator
