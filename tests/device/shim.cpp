// Lets a CPU build of PyTorch record autograd graphs of fake CUDA tensors.
//
// PyTorch asks the CUDA hooks and the device guard for the current device and stream. A CPU build
// has neither, and stops the process. These stand-ins hold no memory and launch nothing. They are
// compiled against the headers of the installed version.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

struct CUDAHooks final : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return false; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return false; }
  void init() const override {}
};

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::CUDAHooks)
}

extern "C" void register_fake_cuda() {
  static c10::impl::FakeGuardImpl<c10::DeviceType::CUDA> guard;
  c10::impl::registerDeviceGuard(c10::DeviceType::CUDA, &guard);
}
