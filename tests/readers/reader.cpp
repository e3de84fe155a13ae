// reader PACKAGE CLIP: runs a package of AOTInductor on a clip of raw floats, [2, 3, 4, 12, 12], and prints
// what comes out.
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>

int main(int, char** arguments) {
  c10::InferenceMode inference;
  auto clip = at::empty({2, 3, 4, 12, 12});
  std::ifstream(arguments[2], std::ios::binary).read(static_cast<char*>(clip.data_ptr()), clip.nbytes());
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  auto out = loader.run({clip})[0].contiguous();
  std::cout.precision(9);
  for (int64_t k = 0; k < out.numel(); ++k) std::cout << out.data_ptr<float>()[k] << "\n";
}
