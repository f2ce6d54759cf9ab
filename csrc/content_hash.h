// A hash of bytes that tells one state of a weight from another, at the speed of memory. No defence against
// forgery.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace madformer {

namespace content_hash_detail {

inline constexpr int kLanes = 8;  // Independent, so that multiplications overlap.
inline constexpr uint64_t kPrime = 0x9E3779B185EBCA87;

// Both halves of the product: the lower one alone would carry upwards only, and let signs cancel each other.
inline uint64_t mix(uint64_t state, uint64_t word) {
  const unsigned __int128 product = static_cast<unsigned __int128>(state ^ word) * kPrime;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace content_hash_detail

inline uint64_t content_hash(const unsigned char* bytes, size_t size) {
  using namespace content_hash_detail;
  constexpr size_t kStride = kLanes * sizeof(uint64_t);
  uint64_t lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = size + lane * kPrime;
  size_t at = 0;
  for (; at + kStride <= size; at += kStride) {
    uint64_t words[kLanes];
    std::memcpy(words, bytes + at, kStride);
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
  }
  uint64_t rest[kLanes] = {};
  std::memcpy(rest, bytes + at, size - at);
  uint64_t hash = size;
  for (int lane = 0; lane < kLanes; ++lane) hash = mix(mix(hash, lanes[lane]), rest[lane]);
  return hash ^ (hash >> 32);
}

}  // namespace madformer
