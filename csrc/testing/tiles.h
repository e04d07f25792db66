// The AMX intrinsics that cpu/kernels/amx.cpp uses, in C++ for processors without them: CONVFAST_EMULATE_TILES. Where the hardware would
// fault, before a configuration is loaded and after its release, they abort.
#pragma once
#include <cstdlib>
#include <cstring>

namespace convfast {
namespace tiles {

enum { kTiles = 8, kRows = 16, kRowBytes = 64 };

struct State {
  bool configured = false;
  alignas(64) unsigned char tile[kTiles][kRows][kRowBytes];
};

static thread_local State state;

inline void configure(const void* config) {
  const unsigned char *bytes = static_cast<const unsigned char*>(config), *rows = bytes + 48;
  if (bytes[0] != 1) std::abort();
  for (int i = 0; i < kTiles; ++i)
    if (rows[i] != kRows || bytes[16 + 2 * i] != kRowBytes || bytes[17 + 2 * i] != 0) std::abort();  // others are not emulated
  std::memset(state.tile, 0, sizeof state.tile);
  state.configured = true;
}

inline void release() { state.configured = false; }

inline void load(int tile, const void* from, long stride) {
  if (!state.configured) std::abort();
  for (int r = 0; r < kRows; ++r) std::memcpy(state.tile[tile][r], static_cast<const char*>(from) + r * stride, kRowBytes);
}

inline void store(int tile, void* to, long stride) {
  if (!state.configured) std::abort();
  for (int r = 0; r < kRows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, state.tile[tile][r], kRowBytes);
}

// c[m][n] += sum over pairs k of a[m][k] b[k][n], of two bfloat16 each. As the hardware does: the first of each pair and the second are summed
// apart, from zero, and c is added last.
inline void multiply(int c, int a, int b) {
  if (!state.configured) std::abort();
  const auto widen = [](unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (int m = 0; m < kRows; ++m) {
    float sum[16], first[16] = {}, second[16] = {};
    for (int k = 0; k < kRows; ++k) {
      unsigned pair, pairs[16];
      std::memcpy(&pair, state.tile[a][m] + 4 * k, 4);
      std::memcpy(pairs, state.tile[b][k], kRowBytes);
      for (int n = 0; n < 16; ++n) first[n] += widen(pair << 16) * widen(pairs[n] << 16);
      for (int n = 0; n < 16; ++n) second[n] += widen(pair & 0xffff0000) * widen(pairs[n] & 0xffff0000);
    }
    std::memcpy(sum, state.tile[c][m], kRowBytes);
    for (int n = 0; n < 16; ++n) sum[n] += first[n] + second[n];
    std::memcpy(state.tile[c][m], sum, kRowBytes);
  }
}

}  // namespace tiles
}  // namespace convfast

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ::convfast::tiles::configure(config)
#define _tile_release() ::convfast::tiles::release()
#define _tile_loadd(tile, from, stride) ::convfast::tiles::load(tile, from, stride)
#define _tile_stored(tile, to, stride) ::convfast::tiles::store(tile, to, stride)
#define _tile_dpbf16ps(c, a, b) ::convfast::tiles::multiply(c, a, b)
