// Checks of the kernels that every processor of an architecture has (kernels/baseline.cpp; NEON's on Arm) and of its dot products, for
// machines without Python or of another architecture, by an emulator: runs the one that is named and says what is wrong; returns 3 where
// the processor lacks what is checked; without a name, lists them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels/kernels.h"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

using namespace convfast::cpu;

namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// The same numbers everywhere, between -1 and 1 and none of them zero.
template <class T>
std::vector<T> numbers(size_t n, unsigned seed) {
  std::vector<T> x(n);
  unsigned long long state = seed * 2654435761u + 1;
  for (T& value : x) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = T(double(long(state >> 40) - (1 << 23)) / (1 << 23)) + T(1e-6);
  }
  return x;
}

// b [k, columns], zero past them, as frames.h packs it.
template <class T>
std::vector<T> packed(const Kernels<T>& table, const std::vector<T>& b, long k, long columns) {
  std::vector<T> to;
  for (long first = 0; first < columns; first += table.panel) {
    const long width = columns - first > table.lanes ? table.panel : table.lanes;
    for (long row = 0; row < k; ++row)
      for (long n = first; n < first + width; ++n) to.push_back(n < columns ? b[row * columns + n] : T(0));
  }
  return to;
}

// Of a sum of `terms` products: at most so many roundings of its size.
template <class T>
void require_near(T found, double exact, double size, long terms, const std::string& where) {
  require(std::fabs(double(found) - exact) <= double(terms + 1) * std::numeric_limits<T>::epsilon() * size,
          where + ": " + std::to_string(double(found)) + " in place of " + std::to_string(exact));
}

// Rows of every height of a tile, K with and without a rest of a vector, in one stretch or two.
template <class T>
void gemm() {
  const Kernels<T>& table = *Table<T>::baseline();
  for (const long rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 19, 33})
    for (const long k : {1, 3, 4, 7, 18})
      for (const long columns : {3, 16, 31, 72})
        for (const bool split : {false, true}) {
          const long of[2] = {split ? k / 2 : k, split ? k - k / 2 : 0}, zero = 0, ld = columns + table.panel;
          if (!of[0]) continue;
          const std::vector<T> a[2] = {numbers<T>(rows * of[0], 1), numbers<T>(rows * (of[1] + 1), 2)}, b = numbers<T>(k * columns, 3);
          const std::vector<T> weights = packed(table, b, k, columns), init = numbers<T>(ld, 4);
          std::vector<T> out(rows * ld, T(NAN));
          table.gemm({rows, {a[0].data(), split ? a[1].data() : nullptr}, {{&zero, 1, of[0], of[0]}, {&zero, 1, of[1], of[1]}}, weights.data(), k,
                      columns, init.data(), 0, out.data(), ld, 0, false, split});
          for (long r = 0; r < rows; ++r)
            for (long n = 0; n < columns; ++n) {
              double exact = init[n], size = std::fabs(exact);
              for (long i = 0; i < k; ++i) {
                const double term = double(i < of[0] ? a[0][r * of[0] + i] : a[1][r * of[1] + i - of[0]]) * b[i * columns + n];
                exact += term;
                size += std::fabs(term);
              }
              require_near(out[r * ld + n], exact, size, k, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
            }
        }
}

// A 2 x 3 convolution of frames with few channels: several stretches of K, which begin anywhere.
template <class T>
void rows_gemm() {
  const Kernels<T>& table = *Table<T>::baseline();
  for (const long channels : {1, 3, 4, 6})
    for (const long width : {3, 8, 11, 29}) {
      const long samples = 2, height = 4, columns = 20, k = 6 * channels, ld = columns + table.panel, down = height - 1, across = width - 2;
      const long frame = height * width * channels, offset[] = {0, width * channels}, sample[] = {0, 1};
      const std::vector<T> frames = numbers<T>(samples * frame, 1), b = numbers<T>(k * columns, 2), weights = packed(table, b, k, columns);
      std::vector<T> out(samples * down * across * ld, T(NAN));
      RowsGemm<T> p = {};
      p.rows = {sample, samples, down, down, across};
      p.a[0] = {frames.data(), frame, {0, width * channels}, {offset, 2, 3 * channels, channels}};
      p.b = weights.data();
      p.columns = columns;
      p.k = k;
      p.out = out.data();
      p.ldo = ld;
      table.rows_gemm(p, 0, samples * down);
      for (long pixel = 0; pixel < samples * down * across; ++pixel)
        for (long n = 0; n < columns; ++n) {
          const T* window = &frames[pixel / (down * across) * frame + (pixel / across % down * width + pixel % across) * channels];
          double exact = 0, size = 0;
          for (long i = 0; i < k; ++i) {
            const double term = double(window[offset[i / (3 * channels)] + i % (3 * channels)]) * b[i * columns + n];
            exact += term;
            size += std::fabs(term);
          }
          require_near(out[pixel * ld + n], exact, size, k, "channels " + std::to_string(channels) + ", width " + std::to_string(width));
        }
    }
}

template <class T>
void outer_sum() {
  const Kernels<T>& table = *Table<T>::baseline();
  for (const long rows : {1, 5, 70})
    for (const long k : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 20})
      for (const long vectors : {1, 2, 5}) {
        const long columns = vectors * table.lanes, zero = 0;
        const std::vector<T> a = numbers<T>(rows * k, 1), g = numbers<T>(rows * columns, 2), before = numbers<T>(k * columns, 3);
        std::vector<T> dw = before;
        table.outer_sum({rows, a.data(), {&zero, 1, k, k}, g.data(), columns, columns, dw.data(), columns, nullptr});
        for (long i = 0; i < k * columns; ++i) {
          double exact = before[i], size = std::fabs(exact);
          for (long r = 0; r < rows; ++r) {
            const double term = double(a[r * k + i / columns]) * g[r * columns + i % columns];
            exact += term;
            size += std::fabs(term);
          }
          require_near(dw[i], exact, size, rows, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
        }
      }
}

template <class T>
void transpose() {
  for (const long rows : {1, 4, 7, 37})
    for (const long columns : {1, 4, 6, 21}) {
      const std::vector<T> from = numbers<T>(rows * columns, 1);
      std::vector<T> to(rows * columns);
      Table<T>::baseline()->transpose(rows, columns, from.data(), columns, to.data(), rows);
      for (long i = 0; i < rows * columns; ++i)
        require(to[i % columns * rows + i / columns] == from[i], std::to_string(rows) + " x " + std::to_string(columns));
    }
}

double ulp(double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1., exponent - 24);
}

// Bounds of tests/test_kernels.py.
void sigmoid_and_tanh() {
  std::vector<float> x;
  for (int i = -400000; i <= 400000; ++i) x.push_back(float(i) * 2.5e-4f);
  const size_t finite = x.size();
  for (const float special : {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -0.f}) x.push_back(special);
  std::vector<float> sigmoid(x.size()), tanh(x.size());
  const Kernels<float>& table = *Table<float>::baseline();
  table.sigmoid(x.size(), x.data(), sigmoid.data());
  table.tanh(x.size(), x.data(), tanh.data());
  for (size_t i = 0; i < finite; ++i) {
    const double of_sigmoid = 1 / (1 + std::exp(-double(x[i]))), of_tanh = std::tanh(double(x[i]));
    require(of_sigmoid < 1e-37 || std::fabs(sigmoid[i] - of_sigmoid) <= 4 * ulp(of_sigmoid), "sigmoid of " + std::to_string(x[i]));
    require(std::fabs(tanh[i] - of_tanh) <= 8 * ulp(of_tanh), "tanh of " + std::to_string(x[i]));
  }
  const float *s = &sigmoid[finite], *t = &tanh[finite];
  require(std::isnan(s[0]) && std::isnan(t[0]), "NaN is lost");
  require(s[1] == 1 && s[2] < 1e-37f && s[3] == 1 && s[4] < 1e-37f && s[5] == .5f && s[6] == .5f, "sigmoid of what is large or small");
  require(t[1] == 1 && t[2] == -1 && t[3] == 1 && t[4] == -1 && t[5] == 1e-45f && t[6] == 0 && std::signbit(t[6]), "tanh of what is large or small");
}

// All numbers of 16 bits come back, and what lies between two of them goes to the nearest, of two to the even one.
void halves() {
  const Kernels<float>& table = *Table<float>::baseline();
  for (const Format format : {kBfloat16, kHalf}) {
    const unsigned infinity = format == kHalf ? 0x7c00 : 0x7f80;
    std::vector<unsigned short> all(65536), back(65536), rounded(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = (unsigned short)i;
    std::vector<float> wide(65536), between(65536);
    table.widen(65536, all.data(), format, wide.data());
    table.narrow(65536, wide.data(), format, back.data());
    for (unsigned i = 0; i < 65536; ++i) {
      const unsigned size = i & 0x7fff;
      if (format == kHalf && size < infinity) {
        const double exact = size < 0x400 ? std::ldexp(size, -24) : std::ldexp(0x400 + size % 0x400, int(size >> 10) - 25);
        require(wide[i] == (i < 0x8000 ? exact : -exact), "a half is widened wrong: " + std::to_string(i));
      }
      require(size > infinity ? std::isnan(wide[i]) && (back[i] & 0x7fff) > infinity : back[i] == i, "not the same after the way back: " + std::to_string(i));
      between[i] = size + 1 < infinity ? wide[i] / 2 + wide[i + 1] / 2 : wide[i];
    }
    table.narrow(65536, between.data(), format, rounded.data());
    for (unsigned i = 0; i < 65536; ++i)
      if ((i & 0x7fff) + 1 < infinity) require(rounded[i] == i + (i & 1), "halfway is not rounded to even: " + std::to_string(i));
  }
}

struct Missing {};

bool has_dots() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return dot_kernels() && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  return dot_kernels() && (getauxval(AT_HWCAP2) & 1ul << 14);
#else
  return false;
#endif
}

// Two slabs of columns, so that every tile begins in every place of a panel; all that is rounded are sums.
void dots() {
  if (!has_dots()) throw Missing();
  const Kernels<float>& table = *Table<float>::baseline();
  for (const long rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 33})
    for (const long n : {1, 32, 41, 96})
      for (const bool from_out : {false, true}) {
        const long k = (n + 31) / 32 * 32, columns = 2 * kSlab, high = (rows + 15) / 16 * 16;
        const std::vector<float> a = numbers<float>(rows * n, 1), b = numbers<float>(k * columns, 2), init = numbers<float>(high * columns, 3);
        std::vector<unsigned short> parts(high * k), column(k * columns), weights(k * columns);
        dot_kernels()->split({rows, n, 1, a.data(), n, parts.data(), 0, k});
        table.narrow(k * columns, b.data(), kBfloat16, column.data());
        std::vector<float> x(high * k), w(k * columns), out = init;
        table.widen(high * k, parts.data(), kBfloat16, x.data());
        table.widen(k * columns, column.data(), kBfloat16, w.data());
        for (long r = 0; r < rows; ++r)
          for (long i = 0; i < k; ++i)
            require(i < n ? std::fabs(x[r * k + i] - a[r * n + i]) <= std::fabs(a[r * n + i]) / 256 : x[r * k + i] == 0, "rounded wrong");
        for (long i = 0; i < k; ++i)
          for (long c = 0; c < columns; ++c)
            weights[c / 32 * 32 * k + i / 32 * 1024 + c % 32 / 16 * 512 + i % 32 / 2 * 32 + c % 16 * 2 + i % 2] = column[i * columns + c];
        dot_kernels()->gemm({rows, 1, parts.data(), 0, k, weights.data(), k, columns, from_out ? nullptr : init.data(), out.data(), columns});
        for (long r = 0; r < rows; ++r)
          for (long c = 0; c < columns; ++c) {
            double exact = init[from_out ? r * columns + c : c], size = std::fabs(exact);
            for (long i = 0; i < k; ++i) {
              const double term = double(x[r * k + i]) * w[i * columns + c];
              exact += term;
              size += std::fabs(term);
            }
            require_near(out[r * columns + c], exact, size, k, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
          }
      }
}

const std::map<std::string, void (*)()> kChecks{
    {"dots", dots},
    {"gemm_float32", gemm<float>},
    {"gemm_float64", gemm<double>},
    {"halves", halves},
    {"outer_sum_float32", outer_sum<float>},
    {"outer_sum_float64", outer_sum<double>},
    {"rows_gemm_float32", rows_gemm<float>},
    {"rows_gemm_float64", rows_gemm<double>},
    {"sigmoid_and_tanh", sigmoid_and_tanh},
    {"transpose_float32", transpose<float>},
    {"transpose_float64", transpose<double>},
};

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const auto& [name, check] : kChecks) std::puts(name.c_str());
    return 0;
  }
  const auto found = kChecks.find(arguments[1]);
  if (found == kChecks.end()) return 2;
  try {
    found->second();
    return 0;
  } catch (const Missing&) {
    return 3;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}
