package runbooks

import "testing"

// TestComplaints: each row of the page lies in a section that a test takes its rows from,
// and names what no other one does.
func TestComplaints(t *testing.T) {
	t.Parallel()
	found := 0
	for _, section := range []string{Way, Certificates, Node} {
		n := len(Complaints(section))
		if n == 0 {
			t.Errorf("section %q has no rows", section)
		}
		found += n
	}
	if all := len(row.FindAllString(doctor, -1)); found != all {
		t.Errorf("%d rows in the sections, %d on the page: one stands elsewhere, or twice", found, all)
	}
}
