/* Layouts that both sides of a ring share, as the C compiler lays them out.
 *
 * Sources: virtio 1.3 §2.7 (split virtqueues) and §5.2 (block device). All
 * fields are little-endian; Drivebay runs on little-endian machines only.
 */
#ifndef DRIVEBAY_LAYOUT_H
#define DRIVEBAY_LAYOUT_H

#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "virtio structures are little-endian, and so must the machine be"
#endif

typedef uint16_t le16;
typedef uint32_t le32;
typedef uint64_t le64;

/* virtio 1.3 §2.7.5: one descriptor. */
struct virtq_desc {
    le64 addr; /* guest-physical */
    le32 len;
    le16 flags;
    le16 next;
};
_Static_assert(sizeof(struct virtq_desc) == 16, "virtio 1.3 §2.7.5");

/* virtio 1.3 §2.7.6; used_event stands behind ring[size]. */
struct virtq_avail {
    le16 flags;
    le16 idx;
    le16 ring[];
};
_Static_assert(sizeof(struct virtq_avail) == 4, "virtio 1.3 §2.7.6");

/* virtio 1.3 §2.7.8. */
struct virtq_used_elem {
    le32 id;
    le32 len;
};
_Static_assert(sizeof(struct virtq_used_elem) == 8, "virtio 1.3 §2.7.8");

/* virtio 1.3 §2.7.8; avail_event stands behind ring[size]. */
struct virtq_used {
    le16 flags;
    le16 idx;
    struct virtq_used_elem ring[];
};
_Static_assert(sizeof(struct virtq_used) == 4, "virtio 1.3 §2.7.8");

/* virtio 1.3 §5.2.6: what every block request begins with. */
struct virtio_blk_req_header {
    le32 type;
    le32 reserved;
    le64 sector;
};
_Static_assert(sizeof(struct virtio_blk_req_header) == 16, "virtio 1.3 §5.2.6");

/* virtio 1.3 §5.2.6: one segment of DISCARD and WRITE_ZEROES. */
struct virtio_blk_discard_segment {
    le64 sector;
    le32 num_sectors;
    le32 flags;
};
_Static_assert(sizeof(struct virtio_blk_discard_segment) == 16, "virtio 1.3 §5.2.6");

#endif
