// The operators tldr_native::attend and tldr_native::attend_and_sharpness, for processes without this package.
//
// native.py compiles it behind attention.cpp, whose conditions it checks, with a line that says PACKED_BYTES.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <tuple>

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

int64_t kind_of(const Tensor& x) { return x.scalar_type() == at::kBFloat16 ? 1 : x.scalar_type() == at::kHalf ? 2 : 0; }

View view(const Tensor& x) {
  return {x.data_ptr(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}, kind_of(x)};
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, const Maybe& log_mass) {
  const auto dtype = q.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "tldr_native computes in float32, and the queries are ", dtype,
              ": write the program without native operators");
  TORCH_CHECK(k.scalar_type() == dtype && v.scalar_type() == dtype,
              "tldr_native: queries, keys and values have several dtypes: ", dtype, ", ", k.scalar_type(), ", ",
              v.scalar_type());
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && k.size(1) == q.size(1) &&
                  k.size(2) == v.size(2) && k.size(3) == q.size(3) && v.size(0) == q.size(0) && v.size(1) == q.size(1),
              "tldr_native takes q [B, H, Nq, d], k [B, H, Nk, d] and v [B, H, Nk, c], not ", q.sizes(), ", ",
              k.sizes(), " and ", v.sizes());
  TORCH_CHECK(!log_mass || log_mass->dim() < 2 || log_mass->size(-2) == 1,
              "tldr_native takes masses that only differ by key, not ", log_mass->sizes(),
              ": write the program without native operators");
}

// As `relative_mass` in blocked.py, [B, H, 1, Nk].
Tensor relative_mass(const Tensor& log_mass, at::IntArrayRef sizes) {
  const auto logs = log_mass.to(at::kFloat);
  const auto most = logs.amax({-1}, true).clamp_min(std::numeric_limits<float>::lowest());
  return logs.sub(most).exp().expand(sizes);
}

Tensor empty_out(const Tensor& q, const Tensor& v) {
  return q.new_empty_symint({q.sym_size(0), q.sym_size(2), q.sym_size(1), v.sym_size(3)}).transpose(1, 2);
}

Tensor empty_sharpness(const Tensor& q) {
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return q.new_empty_symint({q.sym_size(0), q.sym_size(2)}, q.options().dtype(wide));
}

void fill(const Tensor& out, const Tensor* sharpness, const Tensor& q, const Tensor& k, const Tensor& v, double scale,
          const Maybe& mask, const Maybe& log_mass) {
  const Sizes sizes = {q.size(0), q.size(1), q.size(2), v.size(2), q.size(3), v.size(3)};
  const bool keeps = mask && mask->scalar_type() == at::kBool;
  Tensor masked, mass;
  if (mask) {
    masked = (keeps ? *mask : mask->to(at::kFloat)).expand({sizes.samples, sizes.heads, sizes.rows, sizes.keys});
  }
  if (log_mass) mass = relative_mass(*log_mass, {sizes.samples, sizes.heads, 1, sizes.keys});
  const View none = {};
  const View bias = mask && !keeps ? view(masked) : none, keep = keeps ? view(masked) : none;
  const View masses = log_mass ? view(mass) : none;
  const View sharp = sharpness ? view(sharpness->unsqueeze(1).unsqueeze(3)) : none;
  tldr_attend(view(q), view(k), view(v), bias, keep, masses, view(out), sharp, static_cast<float>(scale), sizes,
              PACKED_BYTES);
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Maybe& mask,
              const Tensor& log_mass) {
  check(q, k, v, mask, log_mass);
  const auto out = empty_out(q, v);
  fill(out, nullptr, q, k, v, scale, mask, log_mass);
  return out;
}

std::tuple<Tensor, Tensor> attend_and_sharpness(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                const Maybe& mask, const Maybe& log_mass) {
  check(q, k, v, mask, log_mass);
  const auto out = empty_out(q, v), sharpness = empty_sharpness(q);
  fill(out, &sharpness, q, k, v, scale, mask, log_mass);
  return {out, sharpness};
}

Tensor empty_attend(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const Maybe& mask,
                    const Tensor& log_mass) {
  return empty_out(q, v);
}

std::tuple<Tensor, Tensor> empty_attend_and_sharpness(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                                      const Maybe& mask, const Maybe& log_mass) {
  return {empty_out(q, v), empty_sharpness(q)};
}

}  // namespace

// A process may load this code from several files: the first one registers.
TORCH_LIBRARY_FRAGMENT(tldr_native, library) {
  if (c10::Dispatcher::singleton().findSchema({"tldr_native::attend", ""})) return;
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  library.def("attend(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, Tensor log_mass) -> Tensor", tags);
  library.def(
      "attend_and_sharpness(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask, Tensor? log_mass)"
      " -> (Tensor, Tensor)",
      tags);
  library.impl("attend", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attend)));
  library.impl("attend", torch::dispatch(c10::DispatchKey::Meta, TORCH_FN(empty_attend)));
  library.impl("attend_and_sharpness", torch::dispatch(c10::DispatchKey::CPU, TORCH_FN(attend_and_sharpness)));
  library.impl("attend_and_sharpness", torch::dispatch(c10::DispatchKey::Meta, TORCH_FN(empty_attend_and_sharpness)));
  for (const char* name : {"attend", "attend_and_sharpness"}) {
    library.impl(name, torch::dispatch(c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback()));
  }
}
