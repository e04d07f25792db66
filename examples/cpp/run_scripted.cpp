// Runs a TorchScript model that contains convfast ops, without Python:
//   run_scripted MODEL.pt INPUT.pt OUTPUT.pt [RUNS]
// MODEL.pt comes from torch.jit.save; INPUT.pt is a tensor from torch.save, OUTPUT.pt one for torch.load. Where
// the model returns a tuple, its first tensor is saved.
#include <torch/script.h>
#include <torch/serialize.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

static torch::Tensor read_tensor(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(std::string("cannot read ") + path);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  return torch::pickle_load(bytes).toTensor();
}

static torch::Tensor first_tensor(const torch::IValue& value) {
  if (value.isTensorList()) return value.toTensorVector().at(0);
  return value.isTuple() ? first_tensor(value.toTuple()->elements().at(0)) : value.toTensor();
}

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: run_scripted MODEL.pt INPUT.pt OUTPUT.pt [RUNS]\n";
    return 2;
  }
  try {
    const torch::InferenceMode inference;
    torch::jit::Module model = torch::jit::load(argv[1]);
    model.eval();
    const torch::Tensor input = read_tensor(argv[2]);
    torch::Tensor output = first_tensor(model.forward({input}));

    const int runs = argc > 4 ? std::atoi(argv[4]) : 0;
    const auto start = std::chrono::steady_clock::now();
    for (int run = 0; run < runs; ++run) output = first_tensor(model.forward({input}));
    const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;

    std::cout << "input " << input.sizes() << " -> output " << output.sizes();
    if (runs > 0) std::cout << ", " << spent.count() / runs << " ms";
    std::cout << std::endl;

    const std::vector<char> bytes = torch::pickle_save(output);
    std::ofstream(argv[3], std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  } catch (const std::exception& error) {
    std::cerr << "run_scripted: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
