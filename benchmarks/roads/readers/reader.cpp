// reader [--library LIBRARY] PACKAGE CLIP SIZE...: runs a package of AOTInductor on a clip of raw floats of these sizes,
// and prints what comes out. A library of operators is loaded before.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  c10::InferenceMode inference;
  if (count < 4) {
    std::cerr << "reader [--library LIBRARY] PACKAGE CLIP SIZE...\n";
    return 1;
  }
  if (std::string(arguments[1]) == "--library") {
    if (!dlopen(arguments[2], RTLD_NOW)) {
      std::cerr << dlerror() << "\n";
      return 1;
    }
    arguments += 2, count -= 2;
  }
  std::vector<int64_t> sizes;
  for (int k = 3; k < count; ++k) sizes.push_back(std::stoll(arguments[k]));
  auto clip = at::empty(sizes);
  std::ifstream(arguments[2], std::ios::binary).read(static_cast<char*>(clip.data_ptr()), clip.nbytes());
  torch::inductor::AOTIModelPackageLoader loader(arguments[1]);
  auto out = loader.run({clip})[0].contiguous();
  std::cout.precision(9);
  for (int64_t k = 0; k < out.numel(); ++k) std::cout << out.data_ptr<float>()[k] << "\n";
}
