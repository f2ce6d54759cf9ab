// bfloat16 and float16 as they lie in memory, free of torch: converted to float and back, rounded to nearest
// even.
#pragma once

#include <bit>
#include <cstdint>

namespace madformer {

struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value);
    bits = static_cast<uint16_t>(value != value ? 0x7FC0 : (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
  operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;

  Float16() = default;
  explicit Float16(float value) {
    const uint32_t wide = std::bit_cast<uint32_t>(value), sign = wide >> 16 & 0x8000,
                   size = wide & 0x7FFFFFFF;
    constexpr uint32_t kInfinity = 0x7F800000, kOverflow = 0x477FF000, kSmallestNormal = 0x38800000;
    uint32_t half;
    if (size > kInfinity) {
      half = 0x7E00;
    } else if (size >= kOverflow) {
      half = 0x7C00;
    } else if (size < kSmallestNormal) {
      // The addition rounds at the place of the smallest subnormal's last bit.
      const float sum = std::bit_cast<float>(size) + 0.5f;
      half = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
    } else {
      half = (size - (uint32_t{112} << 23) + 0xFFF + (size >> 13 & 1)) >> 13;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, size = bits & 0x7FFF;
    if (size >= 0x7C00) return std::bit_cast<float>(sign | 0x7F800000 | (size & 0x3FF) << 13);
    // The exponent's bias by a product, which makes subnormals normal.
    const float scaled = std::bit_cast<float>(size << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
  }
};

}  // namespace madformer
