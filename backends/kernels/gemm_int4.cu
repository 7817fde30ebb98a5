// The product with integers in groups (docs/spec/70-int4.md); fourbit_product.cuh has the kernels.
//
// On matrix units groups are powers of two from 32, as GPTQ's and AWQ's are, or whole rows. A weight with an order of
// columns of its own meets activations that a kernel before has gathered: M * K elements written and read once more,
// from the second-level cache, beside N * K / 2 bytes of codes.
//
// Floor: N * K / 2 bytes of codes and 3 or 5 a group, at read bandwidth.
#include "fourbit_product.cuh"
#include "host/arguments.h"
#include "host/ops.h"
#include "host/queue.h"
#include "int4_checks.h"
#include "weight_int4.cuh"

namespace qcore::gpu {
namespace {

constexpr char kOp[] = "gemm_int4";
constexpr int kGatherThreads = 256;
constexpr int kWholeRow = 62;  // log2 of a group that holds any row

// QC-INT4-003: a thread a column, so that its place is read once for all rows.
template <class Element>
QC_KERNEL(kGatherThreads)
gather_kernel(const Element *x, const int32_t *perm, int64_t m, int64_t k, Element *out) {
    const int64_t column = block_index_x() * kGatherThreads + thread_index();
    if (column >= k) {
        return;
    }
    const int64_t from = perm[column];
    for (int64_t row = block_index_y(); row < m; row += block_count_y()) {
        out[row * k + column] = x[row * k + from];
    }
}

template <class Element>
qc_status gather(Queue &queue, uintptr_t x, const int32_t *perm, int64_t m, int64_t k, uintptr_t out) {
    return queue.launch(gather_kernel<Element>, {ceil_div(k, kGatherThreads), Queue::tile_blocks(m)}, kGatherThreads,
                        pointer<const Element>(x), perm, m, k, pointer<Element>(out));
}

int64_t gathered_bytes(int32_t dtype, int64_t m, int64_t k) {
    return (elements(m, k) * dtype_size(dtype) + 63) / 64 * 64;
}

Int4Weight view_of(const qc_weight_int4 &w) {
    const bool whole = w.group_size >= w.k;
    const bool power = (w.group_size & (w.group_size - 1)) == 0;
    Int4Weight view = {};
    view.packed = pointer<const uint8_t>(w.packed);
    view.scales = pointer<const void>(w.scales);
    view.zeros = pointer<const uint8_t>(w.zeros);
    view.row_bytes = ceil_div(w.k, 2);
    view.groups = ceil_div(w.k, w.group_size);
    view.group_size = w.group_size;
    view.scale_dtype = w.scale_dtype;
    view.shift = whole ? kWholeRow : power ? log2_of(w.group_size) : -1;
    return view;
}

}  // namespace

qc_status gemm_int4(int32_t device, uintptr_t stream, int32_t dtype, int64_t m, int64_t n, int64_t k, uintptr_t a,
                    const qc_weight_int4 *w, int32_t bias_dtype, uintptr_t bias, uintptr_t out, uintptr_t workspace,
                    int64_t workspace_bytes) {
    return guarded(kOp, [&] {
        Arguments arguments(kOp, device);
        arguments.dtype("dtype", dtype).count("m", m).count("n", n).count("k", k);
        arguments.extent("m, k", m, k).extent("n, k", n, k).extent("m, n", m, n);
        const qc_status status = check_int4_weight(arguments, w, n, k, kHostReadsMemory, fail);
        if (status != QC_OK) {
            return status;
        }
        arguments.array("a", a, elements(m, k), dtype_size(dtype)).array("out", out, elements(m, n), dtype_size(dtype));
        arguments.bias(bias_dtype, bias, dtype, n);
        if (!arguments.ok() || m == 0 || n == 0) {
            return arguments.status();
        }
        const int splits = splits_of(device, dtype, m, n, k);
        const int64_t gathered = w->perm != 0 ? gathered_bytes(dtype, m, k) : 0;
        if (!arguments.workspace(workspace, workspace_bytes, gathered + partial_bytes(m, n, splits)).ok()) {
            return arguments.status();
        }
        Queue queue(kOp, device, stream);
        const uintptr_t x = gathered > 0 ? workspace : a;
        if (gathered > 0) {
            const auto *perm = pointer<const int32_t>(w->perm);
            const qc_status done = dtype == QC_F32 ? gather<uint32_t>(queue, a, perm, m, k, workspace)
                                                   : gather<uint16_t>(queue, a, perm, m, k, workspace);
            if (done != QC_OK) {
                return done;
            }
        }
        const Int4Weight view = view_of(*w);
        return with_dtype(dtype, [&](auto type) {
            using T = typename decltype(type)::type;
            FourbitProduct<Int4Weight, T> product = {view,
                                                     {pointer<const T>(x), m, k, k % 8 == 0 && aligned(x, 16)},
                                                     {pointer<T>(out), n, bias_view<T>(bias_dtype, bias)},
                                                     aligned(w->packed, 16),
                                                     queue,
                                                     pointer<float>(workspace + static_cast<uintptr_t>(gathered)),
                                                     splits};
            return product.run(takes_matrix(device, dtype, k) && view.shift >= log2_of(kTileDepth));
        });
    });
}

}  // namespace qcore::gpu
