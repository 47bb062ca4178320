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

/* virtio 1.3 §2.8.6: one descriptor of a packed ring, made available and used in place. */
struct virtq_packed_desc {
    le64 addr; /* guest-physical */
    le32 len;
    le16 id;
    le16 flags;
};
_Static_assert(sizeof(struct virtq_packed_desc) == 16, "virtio 1.3 §2.8.6");

/* virtio 1.3 §2.8.10: when one side of a packed ring wants to hear of the other. */
struct virtq_packed_event {
    le16 off_wrap;
    le16 flags;
};
_Static_assert(sizeof(struct virtq_packed_event) == 4, "virtio 1.3 §2.8.10");

/* vhost-user, "Inflight I/O tracking": what a front end keeps of a split queue
 * while its back end is away. */
struct virtq_inflight_split_entry {
    uint8_t inflight;
    uint8_t padding[5];
    uint16_t next;
    uint64_t counter;
};
struct virtq_inflight_split {
    uint64_t features;
    uint16_t version; /* 0: new */
    uint16_t desc_num;
    uint16_t last_batch_head;
    uint16_t used_idx;
    struct virtq_inflight_split_entry desc[];
};
_Static_assert(sizeof(struct virtq_inflight_split_entry) == 16, "vhost-user, inflight, split");
_Static_assert(sizeof(struct virtq_inflight_split) == 16, "vhost-user, inflight, split");

/* The same of a packed queue; the descriptors are kept too, as the ring's get overwritten. */
struct virtq_inflight_packed_entry {
    uint8_t inflight;
    uint8_t padding;
    uint16_t next;
    uint16_t last;
    uint16_t num;
    uint64_t counter;
    uint16_t id;
    uint16_t flags;
    uint32_t len;
    uint64_t addr;
};
struct virtq_inflight_packed {
    uint64_t features;
    uint16_t version;
    uint16_t desc_num;
    uint16_t free_head;
    uint16_t old_free_head;
    uint16_t used_idx;
    uint16_t old_used_idx;
    uint8_t used_wrap_counter;
    uint8_t old_used_wrap_counter;
    uint8_t padding[10];
    struct virtq_inflight_packed_entry desc[];
};
_Static_assert(sizeof(struct virtq_inflight_packed_entry) == 32, "vhost-user, inflight, packed");
_Static_assert(sizeof(struct virtq_inflight_packed) == 32, "vhost-user, inflight, packed");

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
