// Attention and the sharpness of its rows on a CPU, in float32, without a matrix of all pairs: native.py compiles it
// for itself, and with operators.cpp for programs that run where this package is not.
//
// For a block of rows, head by head: the scores, one exponential for both softmaxes, its share of the mean over heads,
// the output. Scores and mean of a block stay in the caches. No sum's order depends on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace {

using Lanes = at::vec::Vectorized<float>;

constexpr int64_t LANES = Lanes::size();
constexpr int64_t PAD = 16;           // packed keys and values are padded to it
constexpr int64_t PANEL = 2 * LANES;  // columns of a product that are computed at a time
#ifdef CPU_CAPABILITY_AVX2
constexpr int64_t TILE = 6;  // rows of a product that are computed at a time: 16 registers hold no more sums
#else
constexpr int64_t TILE = 8;
#endif
constexpr int64_t CHUNK = 4096 / PANEL;      // keys whose panel of values, 16 KiB, stays in the first-level cache
constexpr int64_t BLOCK_FLOATS = 512 << 10;  // scores and mean of a block: high blocks read keys and values less often
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr float SMALLEST = std::numeric_limits<float>::min();

static_assert(PAD % LANES == 0, "a padded row is whole vectors");

// A tensor laid like [samples, heads, rows, columns]: strides in elements, 0 where it broadcasts; no data for None.
struct View {
  void* data;
  int64_t strides[4];
  int64_t kind;  // float, bfloat16 or half as 0, 1 and 2, if its numbers may be of several kinds

  template <class T>
  T* row(int64_t sample, int64_t head, int64_t row) const {
    return data ? static_cast<T*>(data) + sample * strides[0] + head * strides[1] + row * strides[2] : nullptr;
  }
};

struct Sizes {
  int64_t samples, heads, rows, keys, channels, values;
};

struct Sums {
  float plain, weighed;
};

int64_t padded(int64_t length, int64_t to = PAD) { return at::divup(length, to) * to; }

// Whole tiles, as many as the cache holds, or fewer where all threads then come to an end together.
int64_t rows_of_block(const Sizes& n) {
  const int64_t fit = std::max<int64_t>(1, BLOCK_FLOATS / (2 * padded(std::max<int64_t>(1, n.keys))));
  const int64_t threads = at::get_num_threads(), all = std::max<int64_t>(1, n.samples * n.rows);
  const int64_t rounds = at::divup(all, threads * fit);
  return std::max(TILE, padded(std::min(at::divup(all, threads * rounds), n.rows), TILE));
}

// c[TILE, VECTORS * LANES] = a[TILE, depth] b[depth, VECTORS * LANES], added to what c holds or not.
template <int64_t VECTORS>
void tile(const float* a, int64_t a_row, const float* b, float* c, int64_t c_row, int64_t depth, bool add) {
  Lanes sums[TILE][VECTORS];
#pragma GCC unroll 8
  for (int64_t i = 0; i < TILE; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = add ? Lanes::loadu(c + i * c_row + j * LANES) : Lanes(0);
  }
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Lanes right[VECTORS];
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) right[j] = Lanes::loadu(b + (k * VECTORS + j) * LANES);
#pragma GCC unroll 8
    for (int64_t i = 0; i < TILE; ++i) {
      const Lanes left(a[i * a_row + k]);
#pragma GCC unroll 2
      for (int64_t j = 0; j < VECTORS; ++j) sums[i][j] = at::vec::fmadd(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < TILE; ++i) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < VECTORS; ++j) sums[i][j].store(c + i * c_row + j * LANES);
  }
}

// c[rows, columns] = a[rows, depth] b[depth, columns], the part [begin, end) of depth: later parts add to earlier ones.
// b lies in panels one behind the other, each [depth, PANEL], the last perhaps [depth, LANES].
void product(const float* a, int64_t a_row, const float* b, int64_t depth, float* c, int64_t c_row, int64_t rows,
             int64_t columns, int64_t begin, int64_t end) {
  for (int64_t j = 0; j < columns; j += PANEL) {
    const bool whole = columns - j >= PANEL;
    const auto multiply = whole ? tile<2> : tile<1>;
    const float* right = b + j * depth + begin * (whole ? PANEL : LANES);
    for (int64_t i = 0; i < rows; i += TILE) {
      multiply(a + i * a_row + begin, a_row, right, c + i * c_row + j, c_row, end - begin, begin > 0);
    }
  }
}

float total(const Lanes& x) {
  return at::vec::vec_reduce_all<float>([](Lanes& a, Lanes& b) { return a + b; }, x);
}

float largest(const float* row, int64_t length) {
  Lanes top(-INF);
  for (int64_t j = 0; j < length; j += LANES) top = at::vec::maximum(top, Lanes::loadu(row + j));
  return at::vec::vec_reduce_all<float>([](Lanes& a, Lanes& b) { return at::vec::maximum(a, b); }, top);
}

// f(j, j * step) for all j: apart for a step of 1, which a vector loads at once.
template <class F>
void each(int64_t length, int64_t step, const F& f) {
  if (step == 1) {
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) f(j, j);
  } else {
    for (int64_t j = 0; j < length; ++j) f(j, j * step);
  }
}

template <class To, class From>
void copy(To* to, const From* from, int64_t step, int64_t length, float factor) {
  each(length, step, [=](int64_t j, int64_t from_j) {
    to[j] = static_cast<To>(factor * static_cast<float>(from[from_j]));
  });
}

// f with a number of the kind that the view holds.
template <class F>
void of_kind(const View& view, const F& f) {
  switch (view.kind) {
    case 1: return f(c10::BFloat16());
    case 2: return f(c10::Half());
    default: return f(float());
  }
}

void mask(float* row, int64_t length, const float* bias, int64_t bias_step, const bool* keep, int64_t keep_step) {
  if (bias) each(length, bias_step, [=](int64_t j, int64_t from_j) { row[j] += bias[from_j]; });
  if (keep) each(length, keep_step, [=](int64_t j, int64_t from_j) { row[j] = keep[from_j] ? row[j] : -INF; });
}

// Scores become exponentials, in place; their sums without and with mass.
Sums exponentials(float* row, int64_t length, const float* mass) {
  const float top = largest(row, length);
  if (top == -INF) {  // all of the row is masked: it gives zeros
    std::fill_n(row, length, 0.f);
    return {0, 0};
  }
  const Lanes shift(top);
  Lanes plain(0), weighed(0);
  for (int64_t j = 0; j < length; j += LANES) {
    const Lanes e = (Lanes::loadu(row + j) - shift).exp_u20();
    e.store(row + j);
    plain = plain + e;
    if (mass) weighed = at::vec::fmadd(e, Lanes::loadu(mass + j), weighed);
  }
  if (!(top < INF)) return {NOT_A_NUMBER, NOT_A_NUMBER};  // which the fast exponential does not hand on
  return {total(plain), total(mass ? weighed : plain)};
}

void accumulate(float* mean, const float* row, int64_t length, float share, bool first) {
  const Lanes weight(share);
  for (int64_t j = 0; j < length; j += LANES) {
    const Lanes part = Lanes::loadu(row + j) * weight;
    (first ? part : part + Lanes::loadu(mean + j)).store(mean + j);
  }
}

// The sum of a log a, with 0 log 0 = 0.
float sharpness_of(const float* mean, int64_t length) {
  Lanes sum(0);
  for (int64_t j = 0; j < length; j += LANES) {
    const Lanes a = Lanes::loadu(mean + j);
    sum = at::vec::fmadd(a, at::vec::maximum(a, Lanes(SMALLEST)).log(), sum);
  }
  return total(sum);
}

at::DataPtr floats_of(int64_t count) { return c10::GetCPUAllocator()->allocate(sizeof(float) * count); }

float inverse(float x) { return x == 0 ? 0 : 1 / x; }

// Transposed: [keys, channels] to panels [channels, PANEL] of keys.
template <class T>
void pack_keys(const View& k, int64_t sample, int64_t head, const Sizes& n, float* to) {
  const int64_t keys = padded(n.keys);
  for (int64_t start = 0; start < keys; start += PANEL) {
    const int64_t width = std::min(PANEL, keys - start);
    std::fill_n(to, n.channels * width, 0.f);
    for (int64_t j = 0; j < std::min(width, n.keys - start); ++j) {
      const T* from = k.row<T>(sample, head, start + j);
      for (int64_t i = 0; i < n.channels; ++i) to[i * width + j] = static_cast<float>(from[i * k.strides[3]]);
    }
    to += n.channels * width;
  }
}

// Times their mass: [keys, values] to panels [keys, PANEL] of values.
template <class T>
void pack_values(const View& v, const float* mass, int64_t sample, int64_t head, const Sizes& n, float* to) {
  const int64_t keys = padded(n.keys), values = padded(n.values);
  for (int64_t start = 0; start < values; start += PANEL) {
    const int64_t width = std::min(PANEL, values - start);
    std::fill_n(to, keys * width, 0.f);
    for (int64_t j = 0; j < n.keys; ++j) {
      const T* from = v.row<T>(sample, head, j) + start * v.strides[3];
      copy(to + j * width, from, v.strides[3], std::min(width, n.values - start), mass ? mass[j] : 1);
    }
    to += keys * width;
  }
}

// Some samples of all, with their keys and values laid out anew.
struct Packed {
  int64_t first;  // sample
  Sizes n;
  float *k, *v, *mass;  // [samples, heads, ...]; the mass is null where all are alike
};

void pack(const View& k, const View& v, const View& mass, const Packed& to) {
  const Sizes& n = to.n;
  const int64_t keys = padded(n.keys), values = padded(n.values);
  at::parallel_for(0, n.samples * n.heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t sample = to.first + part / n.heads, head = part % n.heads;
      float* weights = to.mass ? to.mass + part * keys : nullptr;
      if (weights) {
        copy(weights, mass.row<float>(sample, head, 0), mass.strides[3], n.keys, 1);
        std::fill(weights + n.keys, weights + keys, 0.f);
      }
      of_kind(k, [&](auto number) {
        pack_keys<decltype(number)>(k, sample, head, n, to.k + part * keys * n.channels);
      });
      of_kind(v, [&](auto number) {
        pack_values<decltype(number)>(v, weights, sample, head, n, to.v + part * keys * values);
      });
    }
  });
}

void attend_packed(const View& q, const Packed& packed, const View& bias, const View& keep, const View& out,
                   const View& sharpness, float scale) {
  const Sizes& n = packed.n;
  const int64_t keys = padded(n.keys), values = padded(n.values);
  const int64_t height = rows_of_block(n), blocks = at::divup(n.rows, height);
  const int64_t row_floats = keys + PAD;  // or rows of a power of two would fall into the same sets of the cache
  const int64_t floats = height * (n.channels + 2 * row_floats + values + 1);
  const auto memory = floats_of(at::get_num_threads() * floats);
  float* scratch = static_cast<float*>(memory.get());
  at::parallel_for(0, n.samples * blocks, 1, [&](int64_t begin, int64_t end) {
    float* queries = scratch + at::get_thread_num() * floats;
    float* scores = queries + height * n.channels;
    float* mean = scores + height * row_floats;
    float* outputs = mean + height * row_floats;
    float* factors = outputs + height * values;
    std::fill_n(queries, height * n.channels, 0.f);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t local = block / blocks, sample = packed.first + local;
      const int64_t top = block % blocks * height, rows = std::min(height, n.rows - top);
      for (int64_t head = 0; head < n.heads; ++head) {
        const int64_t part = local * n.heads + head;
        of_kind(q, [&](auto number) {
          for (int64_t i = 0; i < rows; ++i) {
            const auto* from = q.row<decltype(number)>(sample, head, top + i);
            copy(queries + i * n.channels, from, q.strides[3], n.channels, scale);
          }
        });
        product(queries, n.channels, packed.k + part * keys * n.channels, n.channels, scores, row_floats, rows, keys, 0,
                n.channels);
        for (int64_t i = 0; i < rows; ++i) {
          float* row = scores + i * row_floats;
          mask(row, n.keys, bias.row<float>(sample, head, top + i), bias.strides[3],
               keep.row<bool>(sample, head, top + i), keep.strides[3]);
          std::fill(row + n.keys, row + keys, -INF);
          const Sums sums = exponentials(row, keys, packed.mass ? packed.mass + part * keys : nullptr);
          if (sharpness.data) accumulate(mean + i * row_floats, row, keys, inverse(sums.plain) / n.heads, head == 0);
          factors[i] = inverse(sums.weighed);
        }
        for (int64_t start = 0; start < keys; start += CHUNK) {
          product(scores, row_floats, packed.v + part * keys * values, keys, outputs, values, rows, values, start,
                  std::min(start + CHUNK, keys));
        }
        of_kind(out, [&](auto number) {
          for (int64_t i = 0; i < rows; ++i) {
            copy(out.row<decltype(number)>(sample, head, top + i), outputs + i * values, 1, n.values, factors[i]);
          }
        });
      }
      for (int64_t i = 0; sharpness.data && i < rows; ++i) {
        *sharpness.row<float>(sample, 0, top + i) = sharpness_of(mean + i * row_floats, keys);
      }
    }
  });
}

}  // namespace

extern "C" {

// Of what lies like the scores [samples, heads, rows, keys]: an additive bias, which keys to keep, and the mass of keys
// [samples, heads, 1, keys], each perhaps none; the sharpness [samples, 1, rows, 1], perhaps not wanted. So many bytes
// of keys and values, or one sample of them, are laid out anew at a time.
void tldr_attend(const View& q, const View& k, const View& v, const View& bias, const View& keep, const View& mass,
                 const View& out, const View& sharpness, float scale, const Sizes& n, int64_t packed_bytes) {
  const int64_t keys = padded(n.keys), values = padded(n.values);
  const int64_t k_floats = n.heads * keys * n.channels, v_floats = n.heads * keys * values;
  const int64_t mass_floats = mass.data ? n.heads * keys : 0, floats = k_floats + v_floats + mass_floats;
  const int64_t bytes = std::max<int64_t>(1, sizeof(float) * (k_floats + v_floats));
  const int64_t depth = std::min(n.samples, std::max<int64_t>(1, packed_bytes / bytes));
  const auto memory = floats_of(depth * floats);
  float* packed_k = static_cast<float*>(memory.get());
  float* packed_v = packed_k + depth * k_floats;
  float* packed_mass = mass.data ? packed_v + depth * v_floats : nullptr;
  for (int64_t first = 0; first < n.samples; first += depth) {
    const Sizes part = {std::min(depth, n.samples - first), n.heads, n.rows, n.keys, n.channels, n.values};
    const Packed packed = {first, part, packed_k, packed_v, packed_mass};
    pack(k, v, mass, packed);
    attend_packed(q, packed, bias, keep, out, sharpness, scale);
  }
}

}  // extern "C"
